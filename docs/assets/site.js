// What scrolls sideways can be reached by keyboard.
document.addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll("pre, pre > code, .md-typeset__scrollwrap, .md-typeset__table, .md-sidebar__scrollwrap"))
    box.tabIndex = 0;
});
