
"use strict";
const value = (row, column) => {
  const cell = row.cells[column];
  const text = (cell.firstChild?.nodeValue ?? "").replaceAll("−", "-").replaceAll(",", "");
  return cell.classList.contains("number") ? parseFloat(text) : text;
};

const compare = (a, b) => {
  if (typeof a === "string") return a.localeCompare(b, "en", { numeric: true });
  return a - b;
};

const sort = (table, column, descending) => {
  const rows = [...table.tBodies[0].rows].map((row) => [value(row, column), row]);
  const known = rows.filter(([key]) => !Number.isNaN(key));
  const unknown = rows.filter(([key]) => Number.isNaN(key));
  known.sort(([a], [b]) => (descending ? compare(b, a) : compare(a, b)));
  table.tBodies[0].append(...[...known, ...unknown].map(([, row]) => row));
};

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sort(table, column, descending);
    });
  });
}

const dialog = document.createElement("dialog");
dialog.addEventListener("click", () => dialog.close());
document.body.append(dialog);

for (const image of document.querySelectorAll("figure img")) {
  const enlarge = () => {
    const copy = image.cloneNode();
    copy.removeAttribute("tabindex");
    copy.removeAttribute("role");
    copy.className = "";
    dialog.className = image.closest("figure").classList.contains("svg") ? "svg" : "png";
    dialog.setAttribute("aria-label", image.alt);
    dialog.replaceChildren(copy);
    dialog.showModal();
  };
  image.classList.add("enlarges");
  image.tabIndex = 0;
  image.setAttribute("role", "button");
  image.addEventListener("click", enlarge);
  image.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      enlarge();
    }
  });
}
