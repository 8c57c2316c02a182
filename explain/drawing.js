// Shows the next tokens, the logit lens and the attention weights of a selected token, in the elements of drawing.html.
let data, nLayer, nHead, n, weights; // weights: the lower triangles of [layer, head, row, column], row by row
const selected = {position: 0, layer: 0, head: 0}; // the drawing is about what follows the token at this position

function load(newData) { // newData: see page_data in page.py
  data = newData;
  [nLayer, nHead] = data.shape;
  n = data.ids.length;
  weights = decode(data.attention);
}

function decode(base64) {
  const bytes = atob(base64), integers = new Uint16Array(bytes.length / 2);
  for (let i = 0; i < integers.length; i++) {
    integers[i] = bytes.charCodeAt(2 * i) | bytes.charCodeAt(2 * i + 1) << 8;
  }
  return integers;
}

function weight(layer, head, row, column) {
  const map = (layer * nHead + head) * n * (n + 1) / 2;
  return column > row ? 0 : weights[map + row * (row + 1) / 2 + column] / 65535;
}

const $ = (selector) => document.querySelector(selector);
const textAt = (position) => data.text[data.ids[position]];
const percent = (value) => (value > 0 && value < 0.00005 ? "<0.01" : (100 * value).toFixed(2)) + "%";

function make(tag, content, className = "") { // an element that contains text or elements
  const element = document.createElement(tag);
  element.append(...[content].flat());
  element.className = className;
  return element;
}

function makeValue(tag, content, className, value) { // an element with a bar of length value, from 0 to 1
  const element = make(tag, content, className);
  element.style.setProperty("--value", value);
  return element;
}

function token(id) {
  const element = make("bdi", data.text[id]);
  element.title = data.text[id];
  return element;
}

const tokenAt = (position) => token(data.ids[position]);
const bar = (value) => makeValue("span", "", "bar", value);

function choice(group, value, content, label, className = "choice") { // a radio button that sets selected[group]
  const input = make("input", "");
  Object.assign(input, {type: "radio", name: group, value, checked: selected[group] === value});
  input.setAttribute("aria-label", label);
  input.addEventListener("change", () => select(group, value));
  return make("label", [input, ...content], className);
}

let ready = async () => true; // called before the selection is shown: a page may load it, or return false

async function select(group, value) {
  selected[group] = value;
  for (const input of document.getElementsByName(group)) input.checked = Number(input.value) === value;
  if (!await ready(group)) return;
  if (group === "layer") showHeads();
  if (group === "position") showPosition();
  showAttention();
}

function scrollToSelectedToken() { // if the tokens have more rows than are visible
  const list = $("#tokens"), label = $("#tokens :checked")?.parentElement, margin = 8;
  if (!label) return;
  const top = label.offsetTop - margin, bottom = label.offsetTop + label.offsetHeight + margin;
  list.scrollTop = Math.min(Math.max(list.scrollTop, bottom - list.clientHeight), top);
}

function showLayers() {
  $("#layers").replaceChildren(...Array.from({length: nLayer}, (_, i) =>
    choice("layer", i, [String(i + 1)], `layer ${i + 1} of ${nLayer}`)));
}

function showNext(tokens) { // [element, probability, whether it is the token that follows]
  $("#next").replaceChildren(...tokens.map(([element, p, isActual]) => make("li", [
    make("span", element, isActual ? "actual" : ""), bar(p), make("span", percent(p), "number")])));
}

function showPosition() {
  scrollToSelectedToken();
  const {position} = selected, layers = data.next.map((positions) => positions[position]), last = layers.at(-1);
  for (const place of document.querySelectorAll(".selected-token")) place.replaceChildren(tokenAt(position));
  const [first, probability] = last[0];
  $("#summary").textContent =
    `Token ${position + 1} of ${n}; most likely next: ${data.text[first]}, ${percent(probability)}`;
  showNext(last.map(([id, p]) => [token(id), p, id === data.ids[position + 1]]));
  $("#lens tbody").replaceChildren(...layers.map((tokens, i) => {
    const name = make("th", String(i));
    name.scope = "row";
    return make("tr", [name, make("td", make("ol", tokens.map(([id, p]) =>
      makeValue("li", [token(id), make("span", (100 * p).toFixed(1))], id === first ? "final" : "", p))))]);
  }));
}

function showHeads() {
  $("#heads").replaceChildren(...Array.from({length: nHead}, (_, head) => {
    const canvas = make("canvas", "");
    paint(canvas, selected.layer, head);
    return choice("head", head, [canvas, make("small", "")], `head ${head + 1} of ${nHead}`);
  }));
}

function paint(canvas, layer, head) {
  canvas.width = canvas.height = n;
  const context = canvas.getContext("2d");
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
  for (let row = 0; row < n; row++) {
    for (let column = 0; column <= row; column++) {
      context.globalAlpha = Math.sqrt(weight(layer, head, row, column));
      context.fillRect(column, row, 1, 1);
    }
  }
}

function showAttention() {
  const {position, layer, head} = selected, row = (head) => data.ids.map((_, i) => weight(layer, head, position, i));
  document.querySelectorAll("#heads .choice").forEach((label, head) => {
    const values = row(head), largest = values.indexOf(Math.max(...values));
    label.lastChild.replaceChildren(`${head + 1}: `, tokenAt(largest), ` ${percent(values[largest])}`);
    label.firstChild.setAttribute(
      "aria-label", `head ${head + 1} of ${nHead}, largest weight: ${textAt(largest)} ${percent(values[largest])}`);
  });
  $("#head").replaceChildren(`Layer ${layer + 1}, head ${head + 1}: attention weights of `, tokenAt(position));
  $("#weights").replaceChildren(...row(head).slice(0, position + 1).map((value, i) => make("li", [
    tokenAt(i), make("span", percent(value), "number"), bar(value)])));
  $("#rows").replaceChildren(...data.ids.map((id, i) => {
    const name = make("li", token(id), i === position ? "selected" : "");
    name.addEventListener("click", () => select("position", i));
    return name;
  }));
  paint($("#map canvas"), layer, head);
  $("#map canvas").setAttribute("aria-label", `attention map of layer ${layer + 1}, head ${head + 1}; values above`);
  $("#large").style.setProperty("--n", n);
  $("#large").style.setProperty("--row", n > 40 ? ".8rem" : "1.2rem");
  $("#map span").style.setProperty("--i", position);
}

function draw() {
  showLayers();
  showPosition();
  showHeads();
  showAttention();
}
