// The graph: zoom, pan, focus and choice of nodes.
const canvas = byId("canvas"), tip = byId("tip");
// On a phone the same pictures are in shorter rows, as high as they are: the page is scrolled.
const isNarrow = innerWidth < 640;
if (isNarrow) canvas.replaceChildren(byId("narrow").content);
const svgs = [...canvas.querySelectorAll(":scope > svg")];
const sizes = svgs.map((svg) => ({ x: 0, y: 0, width: svg.viewBox.baseVal.width, height: svg.viewBox.baseVal.height }));
let current = 0, picture = svgs[0], full = sizes[0], view = { ...full };
const groups = new Array(data.nodes.length).fill(null);
const pictureOf = data.nodes.map((_, n) => data.pictures.findLastIndex((each) => each.first <= n));
const arrowsFrom = data.nodes.map(() => []), arrowsTo = data.nodes.map(() => []);
const opens = new Map();
let chosen = -1;

for (const [p, svg] of svgs.entries()) {
  const nodeByKey = new Map(data.nodes.flatMap((node, n) => (pictureOf[n] === p ? [[node.key, n]] : [])));
  svg.setAttribute("role", "group");
  svg.setAttribute("aria-label", svg.querySelector("desc")?.textContent ?? "Computational graph");
  for (const title of svg.querySelectorAll(":scope > title, :scope > desc")) title.remove();
  for (const group of svg.querySelectorAll("g[data-key]")) {
    const title = group.querySelector(":scope > title");
    const n = nodeByKey.get(group.dataset.key);
    if (n === undefined || group.classList.contains("funcprop-box")) continue;
    groups[n] = group;
    data.nodes[n].label = group.dataset.name;
    data.nodes[n].tooltip = title.textContent;
    group.dataset.node = n;
    group.setAttribute("tabindex", "0");
    group.setAttribute("role", "button");
    group.setAttribute("aria-label", `${data.nodes[n].kind} ${title.textContent}`);
    title.remove();
  }
  for (const group of svg.querySelectorAll(".funcprop-edge")) {
    const arrow = { group, source: nodeByKey.get(group.dataset.source), target: nodeByKey.get(group.dataset.target) };
    arrowsFrom[arrow.source].push(arrow);
    arrowsTo[arrow.target].push(arrow);
  }
}
for (const [p, { around, key }] of data.pictures.entries()) {
  const n = data.nodes.findIndex((node, i) => pictureOf[i] === around && node.key === key);
  if (n < 0) continue;
  opens.set(n, p);
  groups[n]?.classList.add("opens");
}

// The picture of what is inside of a module takes the place of the one that it is in.
function openPicture(p) {
  current = p;
  picture = svgs[p];
  full = sizes[p];
  for (const [i, svg] of svgs.entries()) svg.toggleAttribute("hidden", i !== p);
  const trail = [];
  for (let i = p; i >= 0; i = data.pictures[i].around) trail.unshift(i);
  byId("path").hidden = trail.length < 2;
  byId("path").replaceChildren(...trail.flatMap((i, at) => {
    const button = element("button", { type: "button", class: "link" }, data.pictures[i].title || "graph");
    button.addEventListener("click", () => openPicture(i));
    return at ? [" › ", button] : [button];
  }));
  fitHeight();
  begin();
}

// --- zoom and pan ---------------------------------------------------------------------------------

// The part that is seen has the shape of the canvas, so that nothing is distorted or cut off.
function apply() {
  if (!canvas.clientWidth || !canvas.clientHeight) return;
  const shape = canvas.clientWidth / canvas.clientHeight;
  const width = Math.max(view.width, view.height * shape), height = width / shape;
  const x = view.x - (width - view.width) / 2, y = view.y - (height - view.height) / 2;
  view = { x, y, width, height };
  picture.setAttribute("viewBox", `${x} ${y} ${width} ${height}`);
}

const scale = () => Math.max(canvas.clientWidth, 1) / view.width;

// Below this scale names cannot be read: a picture that is too wide for it begins with its first part.
const READABLE = 0.6;
const firstScale = () => Math.max(canvas.clientWidth / full.width, READABLE);

// The canvas is as high as the picture is at its width; beside an open panel it is not too low for that.
function fitHeight() {
  const width = canvas.clientWidth;
  if (!width) return;
  const least = byId("panel").hidden ? 150 : 380;
  const most = isNarrow ? Infinity : 0.8 * innerHeight;
  const height = Math.max(Math.min(full.height * firstScale(), full.height * 1.25, most), least);
  canvas.closest(".viewer").style.setProperty("--stage", `${Math.ceil(height)}px`);
}

function fit() {
  isFitted = canvas.clientWidth > 0 && canvas.clientHeight > 0;
  view = { ...full };
  apply();
}

function begin() {
  fit();
  if (!isFitted || scale() >= READABLE) return;
  const width = canvas.clientWidth / READABLE;
  view = { x: 0, y: 0, width, height: canvas.clientHeight / READABLE };
  apply();
}

function zoom(factor, centre) {
  const at = centre ?? { x: view.x + view.width / 2, y: view.y + view.height / 2 };
  const wanted = Math.min(Math.max(scale() * factor, 0.02), 8) / scale();
  view = { x: at.x - (at.x - view.x) / wanted, y: at.y - (at.y - view.y) / wanted, width: view.width / wanted, height: view.height / wanted };
  apply();
}

function pointAt(event) {
  const box = canvas.getBoundingClientRect();
  return { x: view.x + (event.clientX - box.left) / scale(), y: view.y + (event.clientY - box.top) / scale() };
}

function middle(group) {
  const box = group.getBBox(), offset = group.parentNode.transform?.baseVal.consolidate()?.matrix;
  return { x: box.x + box.width / 2 + (offset?.e ?? 0), y: box.y + box.height / 2 + (offset?.f ?? 0), box };
}

function bringIntoView(n) {
  if (n < 0 || !groups[n] || pictureOf[n] !== current) return;
  const { x, y } = middle(groups[n]);
  const margin = 0.08;
  const isSeen = x > view.x + margin * view.width && x < view.x + (1 - margin) * view.width && y > view.y + margin * view.height && y < view.y + (1 - margin) * view.height;
  if (isSeen) return;
  view.x = x - view.width / 2;
  view.y = y - view.height / 2;
  apply();
}

byId("zoom-in").addEventListener("click", () => zoom(1.4));
byId("zoom-out").addEventListener("click", () => zoom(1 / 1.4));
byId("zoom-fit").addEventListener("click", fit);
canvas.addEventListener("wheel", (event) => {
  if (!event.ctrlKey && !event.metaKey) return;
  event.preventDefault();
  zoom(Math.exp(-event.deltaY / 250), pointAt(event));
}, { passive: false });

const fingers = new Map();
let moved = 0;
canvas.addEventListener("pointerdown", (event) => {
  fingers.set(event.pointerId, event);
  moved = 0;
});
addEventListener("pointermove", (event) => {
  const before = fingers.get(event.pointerId);
  if (!before) return;
  const others = [...fingers.values()].filter((finger) => finger.pointerId !== event.pointerId);
  if (others.length === 1) {
    const distance = (finger) => Math.hypot(finger.clientX - others[0].clientX, finger.clientY - others[0].clientY);
    zoom(distance(event) / Math.max(distance(before), 1), pointAt(others[0]));
  }
  view.x -= (event.clientX - before.clientX) / scale() / (others.length + 1);
  view.y -= (event.clientY - before.clientY) / scale() / (others.length + 1);
  moved += Math.abs(event.clientX - before.clientX) + Math.abs(event.clientY - before.clientY);
  fingers.set(event.pointerId, event);
  canvas.classList.toggle("dragging", moved > 4);
  apply();
});
for (const kind of ["pointerup", "pointercancel"]) {
  addEventListener(kind, (event) => {
    fingers.delete(event.pointerId);
    canvas.classList.remove("dragging");
  });
}
// It has no size until the page is laid out.
let isFitted = false;
let seenWidth = 0;
new ResizeObserver(() => {
  const isWhole = view.width >= full.width - 1 && view.height >= full.height - 1;
  if (canvas.clientWidth !== seenWidth) fitHeight();
  seenWidth = canvas.clientWidth;
  if (isFitted && !isWhole) apply();
  else if (canvas.clientWidth && canvas.clientHeight) begin();
}).observe(canvas);

// --- nodes ------------------------------------------------------------------------------------

function choose(n) {
  if (chosen >= 0) groups[chosen]?.classList.remove("chosen");
  for (const group of canvas.querySelectorAll(".near")) group.classList.remove("near");
  chosen = n;
  if (n < 0 || !groups[n]) return;
  if (pictureOf[n] !== current) openPicture(pictureOf[n]);
  groups[n].classList.add("chosen");
  for (const arrow of [...arrowsFrom[n], ...arrowsTo[n]]) arrow.group.classList.add("near");
}

const nodeAt = (event) => { const group = event.target.closest("[data-node]"); return group ? Number(group.dataset.node) : -1; };
canvas.addEventListener("click", (event) => {
  if (moved > 4) return;
  const n = nodeAt(event);
  if (n >= 0) enter(n);
});
canvas.addEventListener("pointerover", (event) => {
  const n = nodeAt(event);
  if (n < 0 || fingers.size) { tip.hidden = true; return; }
  tip.textContent = [data.nodes[n].tooltip, ...summary(n)].join("\n");
  tip.hidden = false;
  const stage = canvas.parentNode.getBoundingClientRect(), at = groups[n].getBoundingClientRect();
  const left = Math.min(Math.max(at.left - stage.left, 8), stage.width - tip.offsetWidth - 8);
  const below = at.bottom - stage.top + 8;
  tip.style.left = `${Math.max(left, 8)}px`;
  tip.style.top = `${below + tip.offsetHeight < stage.height ? below : Math.max(at.top - stage.top - tip.offsetHeight - 8, 8)}px`;
});
canvas.addEventListener("pointerleave", () => { tip.hidden = true; });

// The norms of what a node holds, for the tooltip.
function summary(n) {
  const node = data.nodes[n];
  if (node.kind === "scope") return [];
  const v = data.variables[node.kind === "variable" ? node.members[0] : data.operators[node.members[0]].out[0]];
  return [["‖value‖", v?.value], ["‖gradient‖", v?.gradient]].filter(([, x]) => x).map(([name, x]) => `${name} = ${digits(x[4])}`);
}

function focusNode(n) {
  if (n === undefined || !groups[n]) return;
  bringIntoView(n);
  groups[n].focus({ preventScroll: true });
}

function enter(n) {
  showNode(n);
  if (opens.has(n)) openPicture(opens.get(n));
}
// Not for a pointer: what it presses would slip away beneath it.
canvas.addEventListener("focusin", (event) => { if (event.target.matches(":focus-visible")) bringIntoView(nodeAt(event)); });
canvas.addEventListener("keydown", (event) => {
  const n = nodeAt(event);
  if (n < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const order = data.nodes.map((_, i) => i).filter((i) => groups[i] && pictureOf[i] === current);
  const at = order.indexOf(n);
  const moves = {
    ArrowRight: () => focusNode(arrowsFrom[n][0]?.target),
    ArrowLeft: () => focusNode(arrowsTo[n][0]?.source),
    ArrowDown: () => focusNode(order[(at + 1) % order.length]),
    ArrowUp: () => focusNode(order[(at + order.length - 1) % order.length]),
    Home: () => focusNode(order[0]),
    End: () => focusNode(order.at(-1)),
    Enter: () => enter(n),
    " ": () => enter(n),
  };
  if (!(event.key in moves)) return;
  event.preventDefault();
  moves[event.key]();
});
openPicture(0);
