(() => {
  "use strict";
  const words = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);
  const filter = (input) => {
    const wanted = words(input.value);
    let shown = 0;
    const items = document.querySelectorAll(input.dataset.search);
    items.forEach((item) => {
      const text = (item.dataset.text || item.textContent).toLowerCase();
      item.hidden = !wanted.every((word) => text.includes(word));
      shown += !item.hidden;
    });
    input.nextElementSibling.textContent = wanted.length ? ` ${shown} of ${items.length}` : "";
  };
  document.querySelectorAll("input[data-search]").forEach((input) => {
    input.parentElement.hidden = false;
    input.addEventListener("input", () => filter(input));
  });
  const sort = (table, column, head) => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const numeric = head.classList.contains("num");
    const key = (row) => row.cells[column].dataset.sort;
    const rows = [...table.tBodies[0].rows].map((row, place) => ({ row, place, key: key(row) }));
    rows.sort((a, b) => {
      if (!a.key || !b.key) return (a.key ? 0 : 1) - (b.key ? 0 : 1) || a.place - b.place;
      const order = numeric ? Number(a.key) - Number(b.key) : a.key.localeCompare(b.key, undefined, { numeric: true });
      return (up ? order : -order) || a.place - b.place;
    });
    table.tBodies[0].append(...rows.map((entry) => entry.row));
  };
  document.querySelectorAll("table[data-sortable]").forEach((table) => {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sort(table, column, head));
    });
  });
})();
