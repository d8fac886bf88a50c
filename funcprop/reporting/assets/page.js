// The data of the page, the theme, and how elements are made: always by text, never by markup.
const data = JSON.parse(document.getElementById("data").textContent);
// What is the same in nearly all is not written for each.
for (const op of data.operators) {
  op.nodes ??= op.node < 0 ? [] : [op.node];
  op.loop ??= -1;
  op.source = data.sources[op.source];
}
for (const v of data.variables) v.loop ??= -1;
const byId = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const SVG = "http://www.w3.org/2000/svg";

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawn(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function digits(x) {
  if (x === null || x === undefined) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size < 1e5 && size >= 1e-3) return String(Number(x.toPrecision(4))).replace("-", "−");
  const [mantissa, exponent] = x.toExponential(2).replace("e+", "e").split("e");
  return `${mantissa.replace("-", "−")} · 10${[...exponent].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("")}`;
}

function bytes(n) {
  if (n === null) return "no size";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (n >= 1000 && unit < units.length - 1) { n /= 1024; unit += 1; }
  return `${unit ? Number(n.toPrecision(3)) : n} ${units[unit]}`;
}

// A formula that is wider than its column is set smaller, as far as it can be read; then it scrolls.
function fitFormulas() {
  const formulas = [...document.querySelectorAll(".equation .form > math:last-child")];
  for (const formula of formulas) formula.style.fontSize = "";
  const ratios = formulas.map((formula) => (formula.clientWidth || 1) / (formula.scrollWidth || 1));
  for (const [i, ratio] of ratios.entries()) if (ratio < 0.995) formulas[i].style.fontSize = `${Math.max(1.04 * ratio, 0.68)}em`;
}
addEventListener("resize", fitFormulas);
addEventListener("toggle", fitFormulas, true);
fitFormulas();

const theme = byId("theme");
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
function showTheme() {
  theme.textContent = isDark() ? "Light theme" : "Dark theme";
}
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
prefersDark.addEventListener("change", showTheme);
showTheme();
