"use strict";
// The page from its data: tables, charts by Vega-Lite, rows. All text comes in by textContent.
const data = JSON.parse(document.getElementById("data").textContent);
const charts = document.getElementById("charts").textContent;
const runs = data.runs;
const $ = (id) => document.getElementById(id);
const NAMES = {accuracy: "accuracy", nll: "NLL", brier: "Brier score"};
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

/** An element with attributes and children; a string is text. */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

function fill(node, ...children) { node.replaceChildren(...children.flat().filter((child) => child !== null)); }
function options(select, pairs, chosen) {
  fill(select, pairs.map(([value, text]) => el("option", {value, selected: value === chosen}, text)));
}
const known = (number) => number !== null && number !== undefined;
const fixed = (number, digits = 3) => known(number) ? number.toFixed(digits) : "–";
const percent = (number, digits = 1) => known(number) ? `${(100 * number).toFixed(digits)}\u00a0%` : "–";
/** A difference with its sign, unless it is printed as 0. */
const signed = (number, digits) => {
  if (!known(number)) return "–";
  const text = Math.abs(number).toFixed(digits);
  return (Number(text) === 0 ? "" : number > 0 ? "+" : "−") + text;
};
const unique = (values) => [...new Set(values)];

// Tables

/** A table in a region that scrolls; a cell is text or an element. */
function table(caption, headings, lines, tall = false) {
  const head = el("tr", {}, headings.map((text) => el("th", {scope: "col"}, text)));
  const body = lines.map(([name, ...cells]) => el("tr", {}, el("th", {scope: "row"}, name),
    cells.map((cell) => el("td", {}, cell))));
  const inner = el("table", {}, el("caption", {}, caption), el("thead", {}, head), el("tbody", {}, body));
  return el("div", {class: tall ? "scroll tall" : "scroll", tabindex: 0, role: "group", "aria-label": caption}, inner);
}

const metric = (key, scale, digits, withP) => ({
  value: (run) => run.metrics[key]?.[0],
  cell: (run) => {
    const [value, low, high, p] = run.metrics[key] ?? [];
    if (!known(value)) return ["–"];
    const number = (x) => (scale * x).toFixed(digits);
    const behind = known(low) && known(high) ? `${number(low)} to ${number(high)}${withP && known(p) ? `, p ${p.toFixed(3)}` : ""}` : "";
    return [number(value), el("small", {}, behind)];
  },
});
const paired = (key, scale, digits) => ({
  value: (run) => typeof run.paired === "object" ? run.paired[key][0] : null,
  cell: (run) => {
    if (typeof run.paired !== "object") return [run.paired ? "not comparable" : "–"];
    const [d, low, high, p, verdict] = run.paired[key];
    const word = {1: "better", [-1]: "worse", 0: "not settled"}[verdict];
    const number = el("span", {class: verdict > 0 ? "better" : verdict < 0 ? "worse" : null}, `${signed(scale * d, digits)} ${word}`);
    return [number, el("small", {}, `${signed(scale * low, digits)} to ${signed(scale * high, digits)}, p ${p.toFixed(3)}`)];
  },
});
const plain = (value, told = (x) => String(x)) => ({value, cell: (run) => [known(value(run)) ? told(value(run)) : "–"]});
const gate = (key, told) => plain((run) => run.gate?.[key], told);
const COLUMNS = {
  metrics: [
    ["ACC % ↑", metric("accuracy", 100, 1)], ["ECE % ↓", metric("ece", 100, 1)],
    ["ECE if calibrated %", metric("ece_if_calibrated", 100, 1, true)], ["NLL ↓", metric("nll", 1, 3)],
    ["Brier ↓", metric("brier", 1, 3)], ["AURC ↓", metric("aurc", 1, 3)], ["rows", plain((run) => run.n)],
  ],
  paired: [
    ["ACC, points ↑", paired("accuracy", 100, 1)], ["NLL ↓", paired("nll", 1, 3)], ["Brier ↓", paired("brier", 1, 3)],
    ["against", plain((run) => run.base === undefined || runs[run.base] === run ? null : runs[run.base].name)],
    ["rows of both", plain((run) => run.paired?.n)],
  ],
  gate: [
    ["wrong ≥ 0.8 ↓", gate("wrong_at_80")], ["wrong ≥ 0.9 ↓", gate("wrong_at_90")], ["rows ≥ 0.9", gate("acted_at_90")],
    ["coverage at 5 % risk ↑", gate("coverage_at_risk_5", percent)], ["risk at 80 % coverage ↓", gate("risk_at_coverage_80", percent)],
    ["AUGRC ↓", gate("augrc", fixed)], ["acted on", gate("acted", percent)], ["wrong of these ↓", gate("risk", percent)],
    ["promised", plain((run) => run.coverage?.threshold?.promised, percent)],
  ],
  cost: [
    ["ms a decision ↓", plain((run) => run.cost.ms, (x) => x.toFixed(1))], ["passes", plain((run) => run.cost.passes)],
    ["fit, s", plain((run) => run.cost.fit, (x) => x.toFixed(1))], ["predict, s", plain((run) => run.cost.predict, (x) => x.toFixed(1))],
    ["memory, MB", plain((run) => run.cost.memory)], ["training rows", plain((run) => run.train_rows)],
  ],
};
const COLUMN_NAMES = {metrics: "metrics with intervals", paired: "paired tests", gate: "the gate", cost: "cost"};
const NOTES = {
  metrics: "In small: 95 % intervals over the rows. ECE if calibrated: what a perfectly calibrated model with the same confidences would score (5 to 95 %).",
  paired: "Each run minus the first of its task, model and seed, on the rows that both answered. No correction for looking at several runs and figures. ECE is not here, because no interval of its differences covers.",
  gate: "wrong ≥ 0.9: wrong answers with a confidence of 0.9 or more. Acted on, wrong of these: by the calibrated threshold, where a run has one.",
  cost: "Milliseconds: seconds of the prediction by rows, on the machine that wrote the record; of fewer draws than were timed, their share.",
};

const state = {sort: null, down: false, drawn: new Set(), page: 0};

function listed() {
  const words = $("run-filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const task = $("run-task").value;
  const text = (run) => [run.name, run.task, run.model, run.method, run.scoring].join(" ").toLowerCase();
  return runs.filter((run) => (!task || run.task === task) && words.every((word) => text(run).includes(word)));
}

function drawRunTable() {
  const columns = COLUMNS[$("run-columns").value];
  const found = listed();
  const column = columns.find(([name]) => name === state.sort)?.[1];
  if (state.sort === "run") found.sort((a, b) => a.name.localeCompare(b.name));
  else if (column) {
    const order = (x, y) => typeof x === "string" ? x.localeCompare(y) : x - y;
    const [some, none] = [true, false].map((has) => found.filter((run) => known(column.value(run)) === has));
    some.sort((a, b) => order(column.value(a), column.value(b)));
    found.splice(0, found.length, ...some, ...none);
  }
  if (state.down) found.reverse();
  const heading = (name, key) => el("th", {scope: "col", "aria-sort": state.sort === key ? (state.down ? "descending" : "ascending") : "none"},
    el("button", {type: "button", onclick: () => {
      state.down = state.sort === key && !state.down;
      state.sort = key;
      drawRunTable();
      $("run-table").querySelectorAll("thead button")[["run", ...columns.map(([one]) => one)].indexOf(key)].focus();
    }}, name, state.sort === key ? (state.down ? " ▾" : " ▴") : ""));
  const lines = found.map((run) => {
    const index = runs.indexOf(run);
    const box = el("input", {type: "checkbox", checked: state.drawn.has(index), "aria-label": `draw ${run.name}`,
      onchange: (event) => { state.drawn[event.target.checked ? "add" : "delete"](index); drawCharts(); }});
    return el("tr", {}, el("td", {}, box), el("th", {scope: "row"}, run.name), columns.map(([, one]) => el("td", {}, one.cell(run))));
  });
  const about = `${found.length} of ${runs.length} runs: ${COLUMN_NAMES[$("run-columns").value]}`;
  fill($("run-table"), el("div", {class: found.length > 30 ? "scroll tall" : "scroll", tabindex: 0, role: "region", "aria-label": "runs"},
    el("table", {}, el("caption", {}, about), el("thead", {}, el("tr", {}, el("th", {scope: "col"}, "draw"),
      heading("run", "run"), columns.map(([name]) => heading(name, name)))), el("tbody", {}, lines))));
  $("run-notes").textContent = NOTES[$("run-columns").value];
}

// Charts

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** The spec of that name in the page's colours. */
function spec(name) {
  const coloured = charts.replace(/"@(\w+)"/g, (_, colour) => JSON.stringify(style(colour)));
  const all = JSON.parse(coloured);
  return {...all[name], config: all.config, width: "container", autosize: {type: "fit-x", contains: "padding"}};
}

/** A figure: heading, caption, chart, and its numbers as a table on demand. */
function figure(title, caption, chart, numbers, onclick) {
  const place = el("div", {class: "chart", role: "img", "aria-label": `${title}. ${caption}`});
  const parts = [el("figcaption", {}, title ? el("h3", {}, title) : null, el("p", {}, caption)), place];
  if (numbers) {
    const details = el("details", {}, el("summary", {}, "Numbers"));
    details.addEventListener("toggle", () => { if (details.children.length === 1) details.append(table(title, ...numbers())); });
    parts.push(details);
  }
  const found = el("figure", {}, parts);
  // a layer without data has no extent, and Vega warns
  if (chart.layer) chart.layer = chart.layer.filter((layer) => !layer.data?.name || chart.datasets[layer.data.name].length);
  found.ready = () => vegaEmbed(place, chart, {renderer: "svg", actions: false, tooltip: {theme: "custom"}}).then(({view}) => {
    // to a screen reader the chart is one picture, with its caption and the table of its numbers
    place.querySelectorAll("svg, svg *").forEach((node) => ["role", "aria-roledescription", "aria-label", "tabindex"].forEach((name) => node.removeAttribute(name)));
    if (onclick) view.addEventListener("click", (_, item) => { if (item?.datum) onclick(item.datum); });
  });
  return found;
}

function reliabilityFigure(run) {
  const [ece, low, high] = run.metrics.ece ?? [];
  const level = run.metrics.ece_if_calibrated?.[0];
  const bins = run.reliability.map((bin) => ({...bin, inside: bin.accuracy >= bin.least && bin.accuracy <= bin.most ? "inside" : "outside"}));
  const outside = bins.filter((bin) => bin.inside === "outside").length;
  const range = known(low) ? ` (${percent(low)} to ${percent(high)})` : "";
  const caption = `ECE ${percent(ece)}${range}${known(level) ? `, if calibrated ${percent(level)}` : ""}; ${outside} of ${bins.length} bins outside the band.`;
  const chart = {...spec("reliability"), datasets: {main: bins}};
  const open = (bin) => { if (known(bin.n)) showBin(run, bin); };
  const numbers = () => [["bin", "rows", "confidence", "accuracy", "calibrated", "open"], bins.map((bin) => [
    `${percent(bin.low, 0)} to ${percent(bin.high, 0)}`, String(bin.n), percent(bin.confidence), percent(bin.accuracy),
    `${percent(bin.least)} to ${percent(bin.most)}`, el("button", {type: "button", onclick: () => open(bin)}, "rows")])];
  return figure(run.name, caption, chart, numbers, open);
}

function coverageFigure(run, drawn) {
  const point = ([coverage, risk]) => ({coverage, risk});
  const others = drawn.filter((other) => other !== run && other.task === run.task).flatMap((other) =>
    other.coverage.points.filter(([share]) => share * other.n >= 20).map((one) => ({...point(one), run: other.name})));
  const main = run.coverage.points.filter(([share]) => share * run.n >= Math.min(20, run.n / 5)).map(point);
  const kept = run.coverage.threshold;
  const threshold = kept ? [{coverage: kept.coverage, risk: kept.risk ?? 0}] : [];
  const promised = kept && known(kept.promised) ? [{risk: kept.promised}] : [];
  let caption = `AURC ${fixed(run.metrics.aurc?.[0])}, by ${run.coverage.by.replaceAll("_", " ")}; no calibrated threshold.`;
  if (kept) {
    caption = `AURC ${fixed(run.metrics.aurc?.[0])}, by ${run.coverage.by.replaceAll("_", " ")}. The threshold${known(kept.value) ? ` ${fixed(kept.value)}` : ""} acts on `
      + `${kept.acted} of ${run.n} rows (${percent(kept.coverage)}), ${kept.wrong} of them wrong (${percent(kept.risk)})`
      + `${known(kept.promised) ? `; promised: at most ${percent(kept.promised)}` : ""}.`;
  }
  const chart = {...spec("coverage"), datasets: {main, others, threshold, promised}};
  return figure(run.name, caption, chart, () => [["coverage", "risk"], run.coverage.points.map(([c, r]) => [percent(c), percent(r)]), true]);
}

/** Bars up for one side and down for the other, the empty ends cut off. */
function mirrored(width, up, down, sides, titles, scale = [1, 1]) {
  const used = [up, down].map((counts) => counts.map((n, i) => n ? i : -1).filter((i) => i >= 0)).flat();
  const [first, last] = [Math.min(...used, up.length), Math.max(...used, 0)];
  const main = [];
  [up, down].forEach((counts, side) => counts.forEach((n, i) => {
    if (n) main.push({low: i * width, high: (i + 1) * width, share: (side ? -1 : 1) * n * scale[side], told: n, side: sides[side][0]});
  }));
  const chart = {...spec("mirrored"), datasets: {main}};
  chart.encoding.x.title = titles[0];
  chart.encoding.x.scale = {domain: [Math.min(first, last) * width, (last + 1) * width], nice: false};
  const {y, color} = chart.layer[0].encoding;
  y.title = titles[1];
  color.scale = {domain: sides.map(([name]) => name), range: sides.map(([, colour]) => style(colour))};
  return chart;
}

const SCORES = {confidence: "confidence", total_entropy: "total entropy", mutual_information: "mutual information"};

/** The bins of a score; those of the confidence from its complement. */
function binsOf(run, score) {
  const found = run.histograms[score === "confidence" ? "one_minus_confidence" : score];
  if (score !== "confidence") return found;
  return {...found, right: [...found.right].reverse(), wrong: [...found.wrong].reverse()};
}

const binNumbers = (width, up, down, names) => () => [["from", "to", ...names],
  up.map((n, i) => [n, down[i], i]).filter(([a, b]) => a || b).map(([a, b, i]) => [fixed(i * width, 2), fixed((i + 1) * width, 2), String(a), String(b)])];

function certaintyFigure(run) {
  const score = $("certainty-score").value;
  const {width, right, wrong, error_auroc: auroc} = binsOf(run, score);
  const sides = [["right", "right"], ["wrong", "wrong"]];
  const chart = mirrored(width, right, wrong, sides, [SCORES[score], "wrong ↓ rows ↑ right"]);
  const caption = `AUROC for errors ${fixed(auroc)}; ${right.reduce((a, b) => a + b)} right, ${wrong.reduce((a, b) => a + b)} wrong.`;
  return figure(run.name, caption, chart, binNumbers(width, right, wrong, sides.map(([name]) => name)));
}

function shiftFigure(shift) {
  const [familiar, shifted] = [runs[shift.familiar], runs[shift.shifted]];
  const counts = [familiar, shifted].map((run) => binsOf(run, "total_entropy"));
  const sums = counts.map(({right, wrong}) => right.map((n, i) => n + wrong[i]));
  const sides = [[familiar.task, "ink"], [shifted.task, "faint"]];
  const chart = mirrored(counts[0].width, ...sums, sides, ["total entropy, as a share of its most", "shifted ↓ % of rows ↑ in domain"],
    [100 / familiar.n, 100 / shifted.n]);
  const caption = `Up: ${familiar.n} rows of ${familiar.task}, trained on. Down: ${shifted.n} rows of ${shifted.task}. AUROC `
    + Object.entries(shift.auroc).map(([score, auroc]) => `${fixed(auroc)} by ${score.replaceAll("_", " ")}`).join(", ") + ".";
  return figure(familiar.name, caption, chart, binNumbers(counts[0].width, ...sums, sides.map(([name]) => name)));
}

function partsFigure(run) {
  const main = run.cloud.map(([expected, mutual, right]) => ({expected, mutual, answer: right ? "right" : "wrong"}));
  const sums = main.reduce(([a, b], dot) => [a + dot.expected, b + dot.mutual], [0, 0]);
  const caption = `On average ${fixed(sums[0] / main.length)} nats ambiguous, ${fixed(sums[1] / main.length)} unknown`
    + `${main.length < run.n ? `; ${main.length} of ${run.n} rows` : ""}.`;
  return figure(run.name, caption, {...spec("parts"), datasets: {main}}, () => [["expected entropy", "mutual information", "answer"],
    main.map((dot) => [fixed(dot.expected), fixed(dot.mutual), dot.answer]), true]);
}

function drawsFigure(fit) {
  const key = $("draws-metric").value;
  const told = fit.runs.map((index) => {
    const [value, low, high] = runs[index].metrics[key] ?? [];
    return {draws: runs[index].draws, value, low, high};
  }).filter((one) => known(one.value));
  const main = told.filter((one) => one.draws > 0);
  const mean = told.filter((one) => !one.draws);
  const prefixes = fit.prefixes.map((one) => ({draws: one.draws, value: one[key]}));
  const chart = {...spec("draws"), datasets: {main, mean, prefixes}};
  chart.layer.at(-1).encoding.y.title = NAMES[key];
  const part = (one) => `${fixed(one.value)} with ${one.draws ? `${one.draws} draws` : "the mean adapter"}`;
  const lines = [...told.map((one) => [one.draws ? String(one.draws) : "mean", fixed(one.value), `${fixed(one.low)} to ${fixed(one.high)}`]),
    ...prefixes.map((one) => [`first ${one.draws}`, fixed(one.value), "–"])];
  return figure(fit.name, `${NAMES[key]}: ${told.map(part).join(", ")}.`, chart, () => [["draws", NAMES[key], "interval"], lines, true]);
}

function slotOf([name, ratio]) {
  const number = name.match(/\.(\d+)\./);
  const parts = name.replace(/\.lora_[AB].*$/, "").split(".");
  return {layer: number ? Number(number[1]) : 0, slot: parts.at(-1) + (/lora_B/.test(name) ? ", B" : ""), ratio};
}

function posteriorFigures(run) {
  const found = [];
  const {slots, prior_std: prior, history} = run.fit;
  if (slots.length) {
    const main = slots.map(slotOf);
    const ratios = main.map((one) => one.ratio);
    const [least, most] = [Math.min(...ratios), Math.max(...ratios)];
    const symbol = prior ? "σ/σ_p" : "σ";
    let caption = `${symbol} from ${fixed(least)} to ${fixed(most)} over ${slots.length} slots${prior ? `; σ_p is ${prior}` : ""}.`;
    if (prior && most < 0.05) caption += " It has collapsed: the draws are almost one adapter.";
    if (prior && least > 0.95) caption += " The data have hardly moved it from the prior.";
    const chart = {...spec("posterior"), datasets: {main, prior: prior ? [{ratio: 1}] : []}};
    chart.layer[1].encoding.y.title = symbol;
    found.push(figure(run.name, caption, chart, () => [["layer", "slot", symbol], main.map((one) => [String(one.layer), one.slot, fixed(one.ratio)]), true]));
  }
  for (const [key, title, scale] of [["kl", "KL, nats", 1], ["std_over_prior", "mean σ/σ_p", 1], ["loss", "training loss", 1]]) {
    const main = history.filter((line) => known(line[key])).map((line) => ({step: line.step, value: scale * line[key]}));
    if (main.length < 2) continue;
    const [first, last] = [main[0].value, main.at(-1).value];
    const before = main[Math.floor(0.8 * (main.length - 1))].value;
    const moved = Math.abs(last - before) / Math.max(Math.abs(first - last), 1e-12);
    const unsettled = key === "kl" && moved > 0.2 ? " In the last fifth it still moved by more than a fifth of its way: not converged." : "";
    const chart = {...spec("course"), datasets: {main}};
    chart.encoding.y.title = title;
    found.push(figure(`${run.name}: ${title}`, `From ${first.toPrecision(4)} at step ${main[0].step} to ${last.toPrecision(4)} at step ${main.at(-1).step}.${unsettled}`,
      chart, () => [["step", title], main.map((one) => [String(one.step), one.value.toPrecision(4)]), true]));
  }
  return found;
}

/** Words in lines of about so many characters. */
function wrapped(text, width) {
  return text.split(" ").reduce((lines, word) => {
    const longer = `${lines.at(-1)} ${word}`;
    return lines[0] === "" ? [word] : longer.length <= width ? [...lines.slice(0, -1), longer] : [...lines, word];
  }, [""]);
}

function costFigure(drawn) {
  const width = Math.max(30, Math.floor(document.querySelector(".panels.wide").clientWidth / 8));
  const costed = drawn.filter((run) => known(run.cost.ms));
  const passes = (run) => `${run.cost.passes} ${run.cost.passes === 1 ? "pass" : "passes"}`;
  const main = costed.map((run) => ({name: run.name, ms: run.cost.ms, told: wrapped(`${run.name}: ${run.cost.ms.toFixed(1)} ms, ${passes(run)}`, width)}));
  const most = Math.max(...main.map((one) => one.told.length));
  const chart = {...spec("cost"), datasets: {main}, height: main.length * (24 + 16 * most)};
  chart.layer[0].mark.yOffset = 6 + 8 * most;
  chart.layer[1].mark.dy = -8 * (most - 1) - 4;
  return costed.length ? [figure("", `The runs drawn, ${costed.length} of them with a known time.`, chart, () => [["run", "ms a decision", "passes"],
    costed.map((run) => [run.name, run.cost.ms.toFixed(1), String(run.cost.passes)])])] : [];
}

function classesFigure(run) {
  const {names, shared, counts, figures} = run.classes;
  const short = names.map((name, i) => shared ? String(i + 1) : name);
  const few = names.length <= 12;
  const main = counts.flatMap((line, i) => line.map((n, j) => ({answer: short[i], choice: short[j], answerName: names[i], choiceName: names[j], n,
    few, share: n / Math.max(1, figures[i][0])})));
  const chart = {...spec("classes"), datasets: {main}};
  const wrong = main.filter((one) => one.answer !== one.choice).sort((a, b) => b.n - a.n)[0];
  const caption = `${shared ? "Numbers are classes, see the table" : "Places in the list of options"}. `
    + (wrong?.n ? `Most often taken for another: ${wrong.answerName} for ${wrong.choiceName}, ${wrong.n} times.` : "None is taken for another.");
  const found = figure(run.name, caption, chart, () => [["right class", ...short.map((name) => `→ ${name}`)],
    counts.map((line, i) => [short[i], ...line.map(String)]), true]);
  found.append(table(`${run.name}: figures of each class`, ["class", "rows", "precision", "recall", "F1"],
    names.map((name, i) => [shared ? `${i + 1} ${name}` : name, String(figures[i][0]), ...figures[i].slice(1).map((x) => percent(x))]), names.length > 12));
  return found;
}

function drawnRuns() { return runs.filter((_, index) => state.drawn.has(index)); }

const WITHOUT = {
  shift: "No drawn run was evaluated on a task other than the one it was trained on.",
  posterior: "No record here says how its fit went; those that this version writes do.",
  parts: "The drawn runs take one pass a row: there are no draws to disagree.",
  draws: "No fit here was evaluated with several numbers of draws, and no rows hold their draws.",
  classes: "No drawn run has rows of equally many options.",
  cost: "No drawn run says how long it took.",
};

const PANELS = {
  reliability: (drawn) => drawn.filter((run) => run.reliability).map(reliabilityFigure),
  coverage: (drawn) => drawn.filter((run) => run.coverage).map((run) => coverageFigure(run, drawn.filter((one) => one.coverage))),
  certainty: (drawn) => drawn.filter((run) => run.histograms && ($("certainty-score").value !== "mutual_information" || disagrees(run))).map(certaintyFigure),
  shift: () => data.shifts.filter((one) => state.drawn.has(one.familiar) || state.drawn.has(one.shifted)).map(shiftFigure),
  parts: (drawn) => drawn.filter(disagrees).map(partsFigure),
  draws: () => data.fits.filter((fit) => fit.runs.some((index) => state.drawn.has(index))).map(drawsFigure),
  posterior: (drawn) => fitsOf(drawn).flatMap(posteriorFigures),
  cost: costFigure,
  classes: (drawn) => drawn.filter((run) => run.classes).map(classesFigure),
};

/** Whether a run has draws that disagree; one pass has none. */
function disagrees(run) { return Boolean(run.cloud?.some(([, mutual]) => mutual > 0)); }

/** One run of each fit, as a fit's course is the same for all numbers of draws. */
function fitsOf(drawn) {
  const seen = new Map();
  for (const run of drawn.filter((one) => one.fit)) {
    const {method, training} = run.settings.config ?? {};
    const key = JSON.stringify([run.model, run.method, run.seed, run.trained_on ?? run.task, run.train_rows, method, training]);
    if (!seen.has(key)) seen.set(key, {...run, name: run.name.replace(/ N=\d+/, "")});
  }
  return [...seen.values()];
}

async function drawPanels(kind, wanted) {
  const place = document.querySelector(`[data-chart="${kind}"]`);
  const figures = PANELS[kind](drawnRuns());
  const told = state.drawn.size ? WITHOUT[kind] ?? "No drawn run has its rows beside it." : "No run is drawn: tick one in the table of runs.";
  fill(place, figures.length ? figures : el("p", {}, told));
  for (const one of figures) if (wanted()) await one.ready();
}

let drawing = Promise.resolve();
let latest = 0;
/** Draws charts one after the other: all of them in place of what is still being drawn, or some. */
function drawCharts(kinds) {
  const own = kinds ? latest : ++latest;
  const wanted = () => own === latest;
  drawing = drawing.then(async () => { for (const kind of kinds ?? Object.keys(PANELS)) if (wanted()) await drawPanels(kind, wanted); });
  return drawing;
}

// Rows

/** A run's answer to a question, of the compact array; `acting` is the decision that acts. */
function answerOf(compact, acting) {
  const [place, units, total, expected, mutual, decision, set, drawn] = compact;
  const p = units.map((unit) => unit / 10000);
  const confidence = Math.max(...p);
  const choice = p.indexOf(confidence);
  const question = data.questions[place];
  return {place, p, total, expected, mutual, decision, set, confidence, choice, question, right: choice === question.answer,
    acted: decision === acting, asked: Boolean(decision) && decision !== acting,
    drawn: drawn.map((draw) => draw.map((unit) => unit / 10000))};
}

const answers = runs.map((run, index) => {
  const acting = run.coverage?.threshold?.acting ?? "act";
  return (data.answers[index] ?? []).map((compact) => answerOf(compact, acting));
});
const byPlace = answers.map((own) => new Map(own.map((one) => [one.place, one])));
const optionName = (question, index) => question.options?.[index] ?? `option ${LETTERS[index] ?? index + 1}`;
const SHOWS = {
  all: ["all rows", () => true], wrong: ["wrong", (a) => !a.right], right: ["right", (a) => a.right],
  act: ["acted on", (a) => a.acted], ask: ["left to a person", (a) => a.asked],
  changed: ["another choice", (a, b) => b && a.choice !== b.choice], mended: ["wrong here, right there", (a, b) => b && !a.right && b.right],
  broken: ["right here, wrong there", (a, b) => b && a.right && !b.right],
};
const ofAnswer = (a) => a.p[a.question.answer];
const ORDERS = {
  unsure: ["most uncertain first", (a) => -a.total], wrong: ["surest errors first", (a) => a.right ? 2 - a.confidence : -a.confidence],
  disagree: ["most disagreement first", (a) => -a.mutual], sure: ["surest first", (a) => -a.confidence],
  moved: ["largest change first", (a, b) => b ? -Math.abs(ofAnswer(a) - ofAnswer(b)) : 0],
};
const PAGE = 20;

function fitting() {
  const index = Number($("row-run").value);
  const other = $("row-other").value === "" ? null : byPlace[Number($("row-other").value)];
  const words = $("row-words").value.toLowerCase();
  const [low, high] = [Number($("row-low").value), Number($("row-high").value)];
  const text = (q) => [q.id, q.question, q.context, ...(q.options ?? [])].join(" ").toLowerCase();
  const shows = SHOWS[$("row-show").value][1];
  const order = ORDERS[$("row-order").value][1];
  const found = answers[index].map((a) => [a, other?.get(a.place)]).filter(([a, b]) =>
    a.confidence >= low && a.confidence <= high && shows(a, b) && (!words || text(a.question).includes(words)));
  return found.map((pair) => [order(...pair), pair]).sort(([x], [y]) => x - y).map(([, pair]) => pair);
}

const verdictTag = (a) => el("span", {class: `tag ${a.right ? "right" : "wrong"}`}, a.right ? "✓ right" : "✗ wrong");
const choiceTold = (a) => [verdictTag(a), ` ${optionName(a.question, a.choice)}, ${percent(a.confidence)}`, a.decision ? `, ${a.decision}` : ""];

/** The mean of an option as a bar, each draw as a dot. */
function track(a, index) {
  const dots = a.drawn.map((draw) => el("b", {style: `left:${(100 * draw[index]).toFixed(1)}%`}));
  return el("div", {class: "track", "aria-hidden": "true"}, el("i", {style: `width:${(100 * a.p[index]).toFixed(1)}%`}), dots);
}

function optionLine(a, b, index, names) {
  const q = a.question;
  const marks = [index === q.answer ? "right answer" : null, index === a.choice ? "chosen" : null, a.set?.includes(index) ? "in the set" : null].filter(Boolean);
  const range = (one) => one.drawn.length ? `, draws ${percent(Math.min(...one.drawn.map((d) => d[index])), 0)} to ${percent(Math.max(...one.drawn.map((d) => d[index])), 0)}` : "";
  const line = [el("span", {}, `${optionName(q, index)} `), marks.length ? el("strong", {}, `(${marks.join(", ")})`) : null];
  const told = (one, name) => [el("div", {class: "told"}, `${name ? `${name}: ` : ""}${percent(one.p[index])}${range(one)}`), track(one, index)];
  return el("li", {}, line, told(a, b ? names[0] : ""), b ? told(b, names[1]) : null);
}

function rowBody(a, b, names) {
  const q = a.question;
  const order = a.p.map((_, index) => index).sort((x, y) => a.p[y] - a.p[x]);
  const list = el("ul", {class: "options", tabindex: 0, "aria-label": "options by probability"});
  const show = (count) => fill(list, order.slice(0, count).map((index) => optionLine(a, b, index, names)));
  show(8);
  const rest = order.length > 8 ? el("button", {type: "button", onclick: (event) => { show(order.length); event.target.remove(); }}, `Show all ${order.length} options`) : null;
  const parts = `Total entropy ${fixed(a.total)} nats: every draw is unsure of ${fixed(a.expected)}; mutual information ${fixed(a.mutual)}.`;
  return el("div", {class: "body"}, q.context ? el("div", {class: "context", tabindex: 0, role: "group", "aria-label": "context"}, q.context) : null,
    list, rest, el("p", {class: "note"}, `${parts} Row ${q.id}.`));
}

function rowOf([a, b], names) {
  const row = el("details", {class: "row"}, el("summary", {}, el("span", {class: "asked"}, a.question.question ?? a.question.id),
    el("span", {class: "told"}, b ? `${names[0]}: ` : "", choiceTold(a)), b ? el("span", {class: "told"}, `${names[1]}: `, choiceTold(b)) : null));
  row.addEventListener("toggle", () => { if (row.open && row.children.length === 1) row.append(rowBody(a, b, names)); });
  return row;
}

function drawRows() {
  const found = fitting();
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  state.page = Math.min(Math.max(state.page, 0), pages - 1);
  const index = Number($("row-run").value);
  const other = $("row-other").value;
  const names = [runs[index].name, other === "" ? "" : runs[Number(other)].name];
  const missing = answers[index].length < runs[index].n ? ` This page holds ${answers[index].length} of the run's ${runs[index].n} rows`
    + `${runs[index].predictions ? `; all are in ${runs[index].predictions}` : ""}.` : "";
  $("row-count").textContent = `${found.length} of ${answers[index].length} rows.${missing}`;
  fill($("row-list"), found.slice(state.page * PAGE, (state.page + 1) * PAGE).map((pair) => rowOf(pair, names)));
  $("row-page").textContent = `page ${state.page + 1} of ${pages}`;
  $("row-back").disabled = state.page === 0;
  $("row-next").disabled = state.page >= pages - 1;
}

function setRows(values) {
  for (const [id, value] of Object.entries(values)) $(`row-${id}`).value = value;
  state.page = 0;
  drawRows();
  $("rows").scrollIntoView();
}

function showBin(run, bin) {
  setRows({run: String(runs.indexOf(run)), show: "all", words: "", low: Math.max(0, bin.low - 5e-5).toFixed(4), high: bin.high.toFixed(4)});
}

// Two runs

/** Exact two-sided sign test: the chance of a split at least as uneven, if either is as likely. */
function signTest(one, other) {
  const n = one + other;
  let term = Math.pow(0.5, n);
  let logTerm = -n * Math.LN2;
  let sum = 0;
  for (let k = 0; k <= Math.min(one, other); k++) {
    term = Math.exp(logTerm);
    sum += term;
    logTerm += Math.log((n - k) / (k + 1));
  }
  return n ? Math.min(1, 2 * sum) : 1;
}

function drawChanges() {
  const [i, j] = [Number($("before").value), Number($("after").value)];
  const pairs = answers[i].map((a) => [a, byPlace[j].get(a.place)]).filter(([, b]) => b);
  if (!pairs.length || i === j) {
    fill($("changes"), el("p", {}, i === j ? "Choose two runs." : "The two have no row in common."));
    return;
  }
  const count = (x, y) => pairs.filter(([a, b]) => a.right === x && b.right === y).length;
  const [mended, broken] = [count(false, true), count(true, false)];
  const changed = pairs.filter(([a, b]) => a.choice !== b.choice).length;
  const part = data.left_out ? ` among the ${pairs.length} rows that this page holds of both` : ` of ${pairs.length} rows`;
  const show = (text, kind) => el("button", {type: "button", onclick: () => setRows({run: String(i), other: String(j), show: kind, order: "moved", words: "", low: 0, high: 1})}, text);
  fill($("changes"),
    el("p", {}, `${changed}${part} have another choice; ${mended} became right and ${broken} wrong (exact sign test: p ${signTest(mended, broken).toFixed(3)}).`),
    table(`${runs[i].name}, then ${runs[j].name}: rows`, ["before", "after: right", "after: wrong"],
      [["right", String(count(true, true)), String(broken)], ["wrong", String(mended), String(count(false, false))]]),
    el("div", {class: "controls"}, show(`Rows with another choice (${changed})`, "changed"), show(`Became right (${mended})`, "mended"), show(`Became wrong (${broken})`, "broken")));
}

// The page

function about() {
  const by = data.versions.bayestune ? `bayestune ${data.versions.bayestune}` : "bayestune";
  $("origin").textContent = `${runs.length} ${runs.length === 1 ? "run" : "runs"}; made ${data.date.replace("T", " ").replace("+00:00", " UTC")} by ${by}${data.revision ? `, revision ${data.revision}` : ""}.`;
  fill($("contents"), [...document.querySelectorAll("main > section")].map((one) =>
    el("li", {}, el("a", {href: `#${one.id}`}, one.querySelector("h2").textContent))));
  const shown = 6;
  const words = data.words.map((text) => el("p", {}, text));
  const rest = el("details", {}, el("summary", {}, `${words.length - shown} more`), words.slice(shown));
  fill($("words"), words.slice(0, shown), words.length > shown ? rest : null);
  const facts = [["command", data.command || "not known"], ["date", data.date], ["revision", data.revision ?? "not known"],
    ["versions", Object.entries(data.versions).map(([name, version]) => `${name} ${version}`).join(", ")]];
  fill($("made-list"), facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, name === "command" ? el("code", {}, value) : value)]));
  const keys = ["model", "task", "method", "scoring", "seed", "draws", "train_rows", "n", "bins", "binning", "revision", "date", "predictions"];
  fill($("made-runs"), runs.map((run) => {
    const details = el("details", {}, el("summary", {}, `${run.name}: configuration and versions`));
    details.addEventListener("toggle", () => {
      if (details.children.length > 1) return;
      const own = Object.fromEntries(keys.filter((key) => known(run[key])).map((key) => [key, run[key]]));
      details.append(el("pre", {tabindex: 0}, JSON.stringify({...own, ...run.settings}, null, 1)));
    });
    return details;
  }));
}

function begin() {
  about();
  const tasks = unique(runs.map((run) => run.task)).filter(Boolean);
  options($("run-task"), [["", "all tasks"], ...tasks.map((task) => [task, task])], "");
  options($("run-columns"), Object.entries(COLUMN_NAMES), "metrics");
  const first = runs.filter((run) => run.task === runs[0].task);
  for (const run of first.slice(0, 6)) state.drawn.add(runs.indexOf(run));
  const withRows = runs.map((run, index) => [String(index), run.name]).filter(([index]) => answers[index].length);
  $("rows").hidden = $("compare").hidden = !withRows.length;
  $("compare").hidden ||= withRows.length < 2;
  const last = withRows.filter(([index]) => runs[index].task === runs[0].task).at(-1)?.[0] ?? withRows.at(-1)?.[0];
  options($("row-run"), withRows, last);
  options($("row-other"), [["", "no other run"], ...withRows], "");
  options($("before"), withRows, withRows[0]?.[0]);
  options($("after"), withRows, last);
  options($("row-show"), Object.entries(SHOWS).map(([key, [text]]) => [key, text]), "all");
  options($("row-order"), Object.entries(ORDERS).map(([key, [text]]) => [key, text]), "unsure");
  document.querySelectorAll("form").forEach((form) => form.addEventListener("submit", (event) => event.preventDefault()));
  for (const id of ["run-filter", "run-task", "run-columns"]) $(id).addEventListener("input", drawRunTable);
  const draw = (found) => { state.drawn = new Set(found.map((run) => runs.indexOf(run))); drawRunTable(); drawCharts(); };
  $("draw-these").addEventListener("click", () => draw(listed()));
  $("draw-none").addEventListener("click", () => draw([]));
  $("certainty-score").addEventListener("input", () => drawCharts(["certainty"]));
  $("draws-metric").addEventListener("input", () => drawCharts(["draws"]));
  for (const id of ["before", "after"]) $(id).addEventListener("input", drawChanges);
  $("row-controls").addEventListener("input", () => { state.page = 0; drawRows(); });
  $("row-back").addEventListener("click", () => { state.page--; drawRows(); });
  $("row-next").addEventListener("click", () => { state.page++; drawRows(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawCharts());
  drawRunTable();
  if (withRows.length) { drawRows(); drawChanges(); }
  return drawCharts();
}

begin().then(() => { document.documentElement.dataset.drawn = "all"; });
