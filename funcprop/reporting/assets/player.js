// Both sweeps as steps: the operators in order, then those that send cotangents back, in reverse.
const steps = [
  ...data.operators.slice(0, data.forward).map((op, i) => ({ sweep: "forward", operator: i, shown: op.out })),
  ...data.backward.map(([i, adds, completes]) => ({ sweep: "backward", operator: i, shown: completes.length ? completes : adds, adds, completes })),
];
const forwardCount = data.forward;
const playButton = byId("play"), slider = byId("position"), caption = byId("caption"), speed = byId("speed");
let step = 0, timer = null;
slider.max = steps.length;
byId("part-forward").style.flex = `${forwardCount} 0 0`;
byId("part-backward").style.flex = `${Math.max(steps.length - forwardCount, 0)} 0 0`;

// What each step lights, and the arrows along which something flows in it.
function touched(s) {
  const op = data.operators[s.operator];
  const squares = (vs) => vs.map((v) => data.variables[v].node).filter((n) => n >= 0);
  // An open loop is all that is inside of it.
  const lit = [...op.nodes, ...squares(s.sweep === "forward" ? op.out : s.adds)];
  const inputs = new Set(squares(s.sweep === "forward" ? op.in : s.adds));
  const sources = new Set([...(s.sweep === "forward" ? op.in : s.adds)].map(nodeOf));
  const outputs = new Set(squares(op.out));
  const flows = [
    ...op.nodes.flatMap((n) => arrowsTo[n]).filter((a) => inputs.has(a.source) || sources.has(a.source)),
    ...op.nodes.flatMap((n) => arrowsFrom[n]).filter((a) => outputs.has(a.target)),
  ];
  return { lit, flows };
}

function clear(...names) {
  for (const name of names) for (const group of canvas.querySelectorAll(`.${name}`)) group.classList.remove(name);
}

function show(position) {
  const from = step;
  step = Math.min(Math.max(position, 0), steps.length);
  clear("now", "flow-forward", "flow-backward");
  // Going back, everything is lit again from the start.
  if (step < from) clear("lit-forward", "lit-backward");
  for (let i = step < from ? 0 : from; i < step; i += 1) {
    for (const n of touched(steps[i]).lit) {
      groups[n]?.classList.add(`lit-${steps[i].sweep}`);
      if (steps[i].sweep === "backward") groups[n]?.classList.remove("lit-forward");
    }
  }
  slider.value = String(step);
  if (step === 0) {
    caption.replaceChildren(element("span", { class: "where" }, "Nothing is computed yet."));
    slider.setAttribute("aria-valuetext", "start");
    return;
  }
  const present = steps[step - 1];
  const { lit, flows } = touched(present);
  for (const n of lit) groups[n]?.classList.add("now");
  for (const arrow of flows) arrow.group.classList.add(`flow-${present.sweep}`);
  bringIntoView(data.operators[present.operator].nodes.find((n) => pictureOf[n] === current) ?? -1);
  describe(present);
}

function describe(present) {
  const isForward = present.sweep === "forward";
  const number = isForward ? step : step - forwardCount, count = isForward ? forwardCount : steps.length - forwardCount;
  const op = data.operators[present.operator];
  const where = `${isForward ? "Forward" : "Backward"} ${number} of ${count} · ${op.name}`;
  const parts = [element("span", { class: `where ${present.sweep}` }, where)];
  for (const v of present.shown.slice(0, 3)) {
    const { keys, isFirst } = formulas(v);
    const key = keys.find((k) => k[0] === (isForward ? "f" : "b"));
    const found = data.variables[v][isForward ? "value" : "gradient"];
    const isPartial = !isForward && !present.completes.includes(v);
    if (isPartial) parts.push(element("span", {}, `a contribution to the gradient of ${data.variables[v].name}`));
    else if (key && isFirst) parts.push(math(key));
    else parts.push(element("span", {}, isForward ? data.variables[v].name : `gradient of ${data.variables[v].name}`));
    if (found && !isPartial) parts.push(element("span", { class: "where" }, `norm ${digits(found[4])}`));
  }
  caption.replaceChildren(...parts);
  slider.setAttribute("aria-valuetext", where);
}

// The whole takes about forty seconds at the usual speed, a step at most 1.1 and at least 0.05 seconds.
const pause = () => Math.min(Math.max(40000 / Math.max(steps.length, 1), 50), 1100) / Number(speed.value);

function tick() {
  show(step + 1);
  if (step >= steps.length) stop();
  else timer = setTimeout(tick, pause());
}

function play() {
  if (step >= steps.length) show(0);
  playButton.setAttribute("aria-pressed", "true");
  playButton.lastElementChild.textContent = "Pause";
  caption.setAttribute("aria-live", "off");
  timer = setTimeout(tick, calm.matches ? pause() : 60);
}

function stop() {
  clearTimeout(timer);
  timer = null;
  playButton.setAttribute("aria-pressed", "false");
  playButton.lastElementChild.textContent = "Play";
  caption.setAttribute("aria-live", "polite");
}

function go(position) {
  stop();
  show(position);
}

const toggle = () => (timer === null ? play() : stop());
playButton.setAttribute("aria-pressed", "false");
playButton.addEventListener("click", toggle);
byId("first").addEventListener("click", () => go(0));
byId("back").addEventListener("click", () => go(step - 1));
byId("next").addEventListener("click", () => go(step + 1));
slider.addEventListener("input", () => go(Number(slider.value)));

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input:not([type=range]), select, textarea")) return;
  const actions = {
    p: toggle, n: () => go(step + 1), b: () => go(step - 1),
    "+": () => zoom(1.4), "-": () => zoom(1 / 1.4), 0: fit, Escape: closePanel,
  };
  const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  action();
});
show(0);
