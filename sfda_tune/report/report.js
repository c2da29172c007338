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
