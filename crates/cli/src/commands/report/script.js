
"use strict";
// Tables are sorted by a click on a heading (again: the other way; again: as they were) and searched by the field above them. A link
// that ends in #sort=SECTION,COLUMN or #sort=SECTION,COLUMN,down opens sorted.
const known = text => {
  const number = text === "" ? NaN : Number(text);
  return Number.isNaN(number) ? [1, text] : [0, number];
};
const compare = (a, b) => a[0] - b[0] || (a[1] < b[1] ? -1 : a[1] > b[1] ? 1 : 0);
const sort = (table, column, order) => {
  [...table.tHead.rows[0].cells].forEach((cell, at) => {
    if (at === column && order) cell.setAttribute("aria-sort", order);
    else cell.removeAttribute("aria-sort");
  });
  const body = table.tBodies[0];
  const rows = [...body.rows].map(row => [known(row.cells[column].textContent.trim()), row]);
  if (!order) rows.sort((a, b) => a[1].dataset.at - b[1].dataset.at);
  else rows.sort((a, b) => (order === "descending" ? -1 : 1) * compare(a[0], b[0]));
  body.append(...rows.map(([, row]) => row));
};
const next = { null: "ascending", ascending: "descending", descending: null };
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tBodies[0].rows].forEach((row, at) => { row.dataset.at = at; });
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = cell.textContent;
    button.addEventListener("click", () => sort(table, column, next[cell.getAttribute("aria-sort")]));
    cell.replaceChildren(button);
  });
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = "search";
  field.setAttribute("aria-label", "search in this table");
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase();
    for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
  table.parentElement.before(field);
}
const asked = /^#sort=(\w+),(\d+)(,down)?$/.exec(location.hash);
const table = asked && document.querySelector(`section[id="${asked[1]}"] table.sortable`);
if (table && asked[2] < table.tHead.rows[0].cells.length) sort(table, Number(asked[2]), asked[3] ? "descending" : "ascending");
