// What the theme leaves to be done for keyboards and screen readers, now and when it adds something.
const SCROLLING = "pre, pre > code, .md-typeset__scrollwrap, .md-typeset__table, .md-sidebar__scrollwrap";

function reach() {
  // what scrolls sideways can be reached by keyboard
  for (const box of document.querySelectorAll(SCROLLING)) if (box.tabIndex < 0) box.tabIndex = 0;
  // landmarks have labels of their own
  const parts = document.querySelectorAll("nav.md-code__nav, nav.md-nav[data-md-level]:not([data-md-level='0'])");
  parts.forEach((part, i) => {
    if (part.dataset.named) return;
    const name = document.getElementById(part.getAttribute("aria-labelledby"))?.textContent.trim();
    part.removeAttribute("aria-labelledby");
    part.setAttribute("aria-label", `${name || "Code block"}, ${i + 1}`);
    part.dataset.named = "yes";
  });
  for (const search of document.querySelectorAll(".md-search[role='dialog']:not([aria-label])")) search.setAttribute("aria-label", "Search");
  // the corner of a table heads nothing
  for (const corner of document.querySelectorAll("th:empty")) corner.replaceWith(document.createElement("td"));
}

document.addEventListener("DOMContentLoaded", () => {
  reach();
  new MutationObserver(reach).observe(document.body, { childList: true, subtree: true });
});
