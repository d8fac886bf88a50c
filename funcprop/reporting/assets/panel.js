// The panel: what a node, a value or an operator holds.
const panel = byId("panel");
const variableByName = new Map(data.variables.map((v, i) => [v.name, i]));
const makers = new Map(), users = new Map();
data.operators.forEach((op, i) => {
  for (const v of op.out) makers.set(v, i);
  for (const v of new Set(op.in)) users.set(v, [...(users.get(v) ?? []), i]);
});

// Of an open loop: what becomes another value, by what it becomes and by what it is.
const comesFrom = new Map(), becomes = new Map();
for (const [source, target, isNext] of data.links) {
  comesFrom.set(target, [...(comesFrom.get(target) ?? []), [source, isNext]]);
  becomes.set(source, [...(becomes.get(source) ?? []), [target, isNext]]);
}

// The node in which a value is seen: its square, or what computes it, or else what uses it.
function nodeOf(variable) {
  const own = data.variables[variable].node;
  if (own >= 0) return own;
  const op = makers.get(variable) ?? users.get(variable)?.[0];
  return op === undefined ? loopOf(variable) : data.operators[op].nodes[0] ?? -1;
}

function loopOf(variable) {
  return data.operators.find((op) => op.inside.includes(variable))?.nodes[0] ?? -1;
}

// A copy of what is typeset in the list of equations; of a folded block, the first one's.
function formulas(variable) {
  const own = data.variables[variable].equations;
  if (own.length) return { keys: own, isFirst: true };
  const node = data.nodes[nodeOf(variable)];
  if (!node || node.kind === "scope") return { keys: [], isFirst: true };
  const first = node.kind === "variable" ? node.members[0]
    : data.operators[node.members[0]].out[data.operators[makers.get(variable)]?.out.indexOf(variable) ?? 0];
  return { keys: data.variables[first]?.equations ?? [], isFirst: first === variable };
}

function math(key) {
  const copy = byId(`eq-${key}`).cloneNode(true);
  copy.removeAttribute("id");
  return copy;
}

function formulaBlocks(variable) {
  const { keys, isFirst } = formulas(variable);
  const blocks = keys.map((key) => {
    const block = element("div", { class: "math", tabindex: "0", role: "group", "aria-label": "Equation" });
    block.append(math(key));
    return block;
  });
  if (keys.length && !isFirst) blocks.push(element("p", { class: "note" }, "Written for the first of the repeated blocks."));
  return blocks;
}

function histogram([low, high, counts]) {
  const most = Math.max(...counts);
  const label = `Histogram from ${digits(low)} to ${digits(high)}: ${counts.join(", ")}`;
  const picture = drawn("svg", { viewBox: `0 0 ${counts.length} 1`, preserveAspectRatio: "none", role: "img", "aria-label": label });
  counts.forEach((n, i) => {
    const height = n ? Math.max(n / most, 0.02) : 0;
    picture.append(drawn("rect", { x: i + 0.06, y: 1 - height, width: 0.88, height }));
  });
  const ends = element("div", { class: "ends" }, element("span", {}, digits(low)), element("span", {}, digits(high)));
  return element("div", { class: "histogram" }, picture, ends);
}

function numbers(title, kind, found) {
  if (!found) return [];
  const [low, high, mean, std, norm, zeros, nonfinite, size, bars] = found;
  const list = element("dl", { class: "statistics" });
  const add = (name, text, alarm) => list.append(element("dt", {}, name), element("dd", alarm ? { class: "alarm" } : {}, text));
  add("min", digits(low)); add("max", digits(high));
  add("mean", digits(mean)); add("std", digits(std));
  add("norm", digits(norm)); add("zeros", zeros ? `${digits(100 * zeros)} %` : "none");
  add("entries", size.toLocaleString("en")); add("not finite", String(nonfinite), nonfinite > 0);
  const heading = element("h4", { class: `of-${kind}` }, title);
  const box = element("div", { class: `of-${kind}` });
  if (bars) box.append(histogram(bars));
  box.append(list);
  return [heading, box];
}

function link(text, action, after = "") {
  const button = element("button", { type: "button", class: "link" }, text);
  button.addEventListener("click", action);
  return after ? element("div", {}, button, " ", element("small", {}, after)) : button;
}

const linkTo = (v) => link(data.variables[v].name, () => showVariable(v), data.variables[v].type);
const linkToOperator = (o) => link(data.operators[o].name, () => showOperator(o), data.operators[o].op);

function links(title, made) {
  return made.length ? [element("h4", {}, title), element("div", { class: "links" }, ...made)] : [];
}

function head(title, about) {
  const close = element("button", { type: "button", class: "close", "aria-label": "Close" }, "×");
  close.addEventListener("click", closePanel);
  const header = element("header", {}, element("h3", {}, title), close);
  return [header, ...about.filter(Boolean).map((line) => element("p", { class: "about" }, line))];
}

// Which of the repetitions of a folded block is shown.
function repetitions(members, present, show) {
  if (members.length < 2) return [];
  const choice = element("select");
  members.forEach((m, i) => choice.append(element("option", { value: m }, `${i + 1} of ${members.length}`)));
  choice.value = String(present);
  choice.addEventListener("change", () => show(Number(choice.value)));
  return [element("label", {}, "Repetition ", choice)];
}

// Values at the edges of an open loop: where they come from, and what they are next.
function passages(variable) {
  const listed = (found, texts) => (found ?? []).map(([v, isNext]) => link(data.variables[v].name, () => showVariable(v), texts[Number(isNext)]));
  const isInside = data.variables[variable].loop >= 0;
  return [
    ...links("Comes from", listed(comesFrom.get(variable), isInside ? ["from outside of the loop", "of the step before"] : ["in the loop", ""])),
    ...links("Becomes", listed(becomes.get(variable), [isInside ? "a result of the loop" : "in the loop", "in the next step"])),
  ];
}

const inLoop = (loop) => links("In the loop", loop < 0 ? [] : [linkToOperator(loop)]);
const UNKNOWN = "Nothing is known of its numbers: the sweeps did not keep it for the steps of the loop.";
function unknown(v) {
  return v.kind === "inside" && !v.value && data.isRun ? [element("p", { class: "note" }, UNKNOWN)] : [];
}

const KINDS = { parameter: "parameter", input: "input", constant: "constant", intermediate: "computed value", inside: "value inside of a loop" };

function showVariable(i) {
  const v = data.variables[i];
  const node = v.node >= 0 ? data.nodes[v.node] : null;
  const entries = v.entries === undefined ? [] : [element("h4", {}, "Entries"), element("pre", { tabindex: "0" }, v.entries)];
  fill(nodeOf(i),
    ...head(v.name, [`${v.type} · ${v.bytes === null ? KINDS[v.kind] : `${bytes(v.bytes)} · ${KINDS[v.kind]}`}`, v.scope && `in ${v.scope}`]),
    ...(node ? repetitions(node.members, i, showVariable) : []),
    ...formulaBlocks(i),
    ...numbers(v.kind === "inside" ? "Value, over all steps" : "Value", "value", v.value),
    ...numbers(v.kind === "inside" ? "Gradient, over all steps" : "Gradient", "gradient", v.gradient),
    ...unknown(v),
    ...entries,
    ...passages(i),
    ...inLoop(v.loop),
    ...links("Computed by", makers.has(i) ? [linkToOperator(makers.get(i))] : []),
    ...links("Used by", (users.get(i) ?? []).map(linkToOperator)));
}

function showOperator(i) {
  const op = data.operators[i];
  const title = [op.op, op.op.replaceAll("_", " ")].includes(op.symbol) ? op.op : `${op.symbol}  ${op.op}`;
  const results = op.out.flatMap((o) => {
    const v = data.variables[o];
    const several = op.out.length > 1 ? `${v.name}: ` : "";
    return [...numbers(`${several}value, ${v.type}, ${bytes(v.bytes)}`, "value", v.value), ...numbers(`${several}gradient`, "gradient", v.gradient)];
  });
  const untyped = op.out.filter((o) => !data.variables[o].value).map((o) => element("p", { class: "about" }, `${data.variables[o].name}: ${data.variables[o].type}, ${bytes(data.variables[o].bytes)}`));
  fill(op.nodes[0] ?? -1,
    ...head(title, [`${op.name} · ${op.flops.toLocaleString("en")} operations`, op.scope && `in ${op.scope}`, op.source]),
    ...repetitions(data.nodes[op.node]?.kind === "operator" ? data.nodes[op.node].members : [], i, showOperator),
    ...untyped,
    ...op.out.flatMap(formulaBlocks),
    ...results,
    ...op.out.slice(0, 1).flatMap((o) => unknown(data.variables[o])),
    ...inLoop(op.loop),
    ...links("Inside of the loop", op.inside.map(linkTo)),
    ...links("Reads", [...new Set(op.in)].map(linkTo)),
    ...links("Writes", op.out.map(linkTo)));
}

function showScope(n) {
  const node = data.nodes[n];
  fill(n, ...head(node.label, [`${node.members.length} operators`]), ...links("Inside", node.members.map(linkToOperator)));
}

function showNode(n) {
  const node = data.nodes[n];
  if (node.kind === "scope") showScope(n);
  else if (node.kind === "variable") showVariable(node.members[0]);
  else showOperator(node.members[0]);
}

function fill(node, ...content) {
  panel.replaceChildren(...content);
  panel.hidden = false;
  panel.scrollTop = 0;
  fitHeight();
  choose(node);
}

function closePanel() {
  panel.replaceChildren();
  panel.hidden = true;
  fitHeight();
  choose(-1);
}

for (const button of document.querySelectorAll("[data-variable]")) {
  button.addEventListener("click", () => {
    const i = variableByName.get(button.dataset.variable);
    showVariable(i);
    bringIntoView(nodeOf(i));
    byId("graph").scrollIntoView();
  });
}
