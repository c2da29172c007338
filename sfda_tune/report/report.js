"use strict";
// Headings become buttons that sort; without this script the tables are merely not sortable.
for (const heading of document.querySelectorAll("table.sortable th[scope=col]")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...heading.childNodes);
  heading.append(button);
  button.addEventListener("click", () => {
    const body = heading.closest("table").tBodies[0];
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    const read = (row) => row.cells[heading.cellIndex].dataset.value ?? row.cells[heading.cellIndex].textContent.trim();
    const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [read(a), read(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what is unknown stays last
      return ascending ? compare(x, y) : compare(y, x);
    });
    body.append(...rows);
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));

// What needs this script shows itself: filters, copies, downloads.
const say = (button, text) => { const was = button.textContent; button.textContent = text; setTimeout(() => { button.textContent = was; }, 1500); };
const save = (name, type, text) => {
  const link = document.createElement("a");
  link.href = text.startsWith("data:") ? text : URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
};
const copy = (text) => {
  const area = document.createElement("textarea"); // also where there is no secure context, as in a file
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
};
const data = JSON.parse(document.getElementById("data").textContent);
const SHOWN = ["fill", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "font-size", "font-family", "text-anchor", "paint-order"];
const draw = (svg) => { // with all that the style says, for nothing else travels with a picture
  const { width } = svg.getBoundingClientRect(), height = Number(svg.getAttribute("height"));
  const twin = svg.cloneNode(true);
  const dress = (from, to) => {
    const style = getComputedStyle(from);
    for (const name of SHOWN) to.setAttribute(name, style.getPropertyValue(name));
    [...from.children].forEach((child, i) => dress(child, to.children[i]));
  };
  dress(svg, twin);
  for (const use of twin.querySelectorAll("use")) {
    const shape = document.querySelector(use.getAttribute("href")).cloneNode(true);
    shape.removeAttribute("id");
    const at = (name, whole) => { const v = use.getAttribute(name); return v.endsWith("%") ? (parseFloat(v) / 100) * whole : Number(v); };
    shape.setAttribute("transform", `translate(${at("x", width)} ${at("y", height)})`);
    for (const name of SHOWN) shape.setAttribute(name, use.getAttribute(name));
    use.replaceWith(shape);
  }
  const outer = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const [w, h] = [width + 90, height + 60];
  for (const [name, value] of Object.entries({ width: w, height: h, viewBox: `0 0 ${w} ${h}` })) outer.setAttribute(name, value);
  const text = (x, y, content, anchor) => {
    const label = document.createElementNS(outer.namespaceURI, "text");
    const look = { x, y, "text-anchor": anchor, "font-size": "13px", "font-family": "sans-serif", fill: getComputedStyle(svg).fill };
    for (const [name, value] of Object.entries(look)) label.setAttribute(name, value);
    label.textContent = content;
    outer.append(label);
  };
  const ground = document.createElementNS(outer.namespaceURI, "rect");
  for (const [name, value] of Object.entries({ width: w, height: h, fill: getComputedStyle(document.body).backgroundColor })) ground.setAttribute(name, value);
  const figure = svg.closest("figure");
  outer.append(ground);
  text(8, 18, figure.querySelector("h3").textContent, "start");
  text(w - 8, h - 8, figure.querySelector("p.plot").textContent, "end");
  for (const [name, value] of Object.entries({ x: 60, y: 32, width, overflow: "visible" })) twin.setAttribute(name, value);
  outer.append(twin);
  const image = new Image(), scale = 2;
  image.onload = () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [scale * w, scale * h];
    const brush = canvas.getContext("2d");
    brush.scale(scale, scale);
    brush.drawImage(image, 0, 0);
    save(`${svg.querySelector("title").textContent.replace(/\W+/g, "_")}.png`, "image/png", canvas.toDataURL("image/png"));
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(outer))}`;
};
const actions = {
  csv: () => save("ranking.csv", "text/csv", data.csv),
  json: () => save("ranking.json", "application/json", JSON.stringify(data.json, null, 1)),
  png: (button) => draw(button.closest("figure").querySelector(".plot > svg")),
  copy: (button) => say(button, copy(button.closest(".command").querySelector("code").textContent) ? "Copied" : "Could not copy"),
  table: (button) => {
    const rows = [...button.closest("section").querySelectorAll("table tr")].filter((row) => !row.hidden);
    const text = rows.map((row) => [...row.cells].map((cell) => cell.textContent.trim().replace(/\s+/g, " ")).join("\t")).join("\n");
    say(button, copy(text) ? "Copied" : "Could not copy");
  },
};
for (const button of document.querySelectorAll("button[data-do]")) {
  button.addEventListener("click", () => actions[button.dataset.do](button));
}
for (const tools of document.querySelectorAll(".tools")) tools.hidden = false;
for (const form of document.querySelectorAll(".filters")) {
  const filter = () => {
    const asked = [...form.querySelectorAll("[data-key]")].filter((field) => field.value !== "");
    const fits = ({ dataset }) => asked.every(({ value, dataset: { key, more, unit } }) => {
      if (key === "license") return dataset.license === value;
      if (dataset[key] === "") return false; // what is unknown is not known to fit
      const limit = Number(value) * Number(unit ?? 1);
      return more ? Number(dataset[key]) >= limit : Number(dataset[key]) <= limit;
    });
    const section = form.closest("section");
    for (const item of section.querySelectorAll("[data-params]")) item.hidden = !fits(item);
    const rows = [...section.querySelectorAll("tbody tr")];
    form.querySelector("output").textContent = asked.length ? `${rows.filter((row) => !row.hidden).length} of ${rows.length}` : "";
  };
  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
}
