// Tables that are sorted and searched without asking the server, which does the same for those without scripts.
//
// - <table data-sortable>, <th data-sort="key" data-first="asc|desc"><a href="?sort=key">: a click sorts; what is
//   sorted by is a cell's data-value, else its text; empty ones are last. The address follows.
// - <form data-search="id of a tbody"> with an <input name="q">: rows without the text are hidden.
"use strict";

(() => {
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

  const valueOf = (row, place) => {
    const cell = row.cells[place];
    return cell ? (cell.dataset.value ?? cell.textContent.trim()) : "";
  };
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? collator.compare(a, b) : x - y;
  };

  function sort(table, header, order) {
    const place = [...header.parentNode.cells].indexOf(header);
    const sign = order === "desc" ? -1 : 1;
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [valueOf(row, place), row]);
    rows.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * compare(a, b);
    });
    body.append(...rows.map(([, row]) => row));
    for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", order === "desc" ? "descending" : "ascending");
  }

  const remember = (values) => {
    const address = new URL(location.href);
    for (const [name, value] of Object.entries(values)) {
      if (value) address.searchParams.set(name, value);
      else address.searchParams.delete(name);
    }
    history.replaceState(null, "", address);
  };

  document.addEventListener("click", (event) => {
    const link = event.target.closest("table[data-sortable] th[data-sort] a");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const header = link.closest("th");
    const was = header.getAttribute("aria-sort");
    const first = header.dataset.first;
    const order = was ? (was === "descending" ? "asc" : "desc") : first;
    sort(header.closest("table"), header, order);
    remember({ sort: header.dataset.sort, order });
  });

  // Search

  const boxes = [...document.querySelectorAll("form[data-search]")];

  function filter(form) {
    const words = form.elements.q.value.trim().toLowerCase();
    const body = document.getElementById(form.dataset.search);
    if (!body) return;
    let found = 0;
    for (const row of body.rows) {
      row.hidden = words !== "" && !row.textContent.toLowerCase().includes(words);
      found += !row.hidden;
    }
    const said = form.querySelector("[role=status]");
    if (said) said.textContent = words ? `${found} found` : "";
  }

  for (const form of boxes) {
    form.addEventListener("submit", (event) => event.preventDefault());
    form.elements.q.addEventListener("input", () => {
      filter(form);
      remember({ q: form.elements.q.value.trim() });
    });
    if (form.elements.q.value) window.condor.refresh("reset"); // the server left out what is not searched for
  }
  document.addEventListener("condor:swapped", () => boxes.forEach(filter));
})();
