(() => {
  "use strict";
  const root = document.documentElement;

  // -- light and dark -----------------------------------------------------------------------------------------------
  const toggle = document.getElementById("theme");
  const preferred = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : preferred.matches);
  const show = () => toggle.setAttribute("aria-pressed", String(isDark()));
  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  preferred.addEventListener("change", show);
  show();

  // -- sorting ------------------------------------------------------------------------------------------------------
  const valueOf = (row, column) => {
    const cell = row.cells[column];
    return "v" in cell.dataset ? cell.dataset.v : cell.textContent.trim();
  };
  const compare = (a, b) => {
    if (a === "" || b === "") return a === b ? 0 : a === "" ? 1 : -1;
    const [x, y] = [Number(a), Number(b)];
    if (!Number.isNaN(x) && !Number.isNaN(y)) return x - y;
    return a.localeCompare(b, undefined, { numeric: true });
  };
  for (const head of document.querySelectorAll("table.sortable th[aria-sort]")) {
    head.querySelector("button").addEventListener("click", () => {
      const body = head.closest("table").tBodies[0];
      const falling = head.getAttribute("aria-sort") === "ascending";
      for (const other of head.parentElement.cells) {
        if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
      }
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const rows = [...body.rows].map((row) => [valueOf(row, head.cellIndex), row]);
      rows.sort(([a], [b]) => (a === "" || b === "" ? compare(a, b) : falling ? compare(b, a) : compare(a, b)));
      body.append(...rows.map(([, row]) => row));
    });
  }

  // -- where in the page --------------------------------------------------------------------------------------------
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const seen = new Set();
  const observer = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) seen[isIntersecting ? "add" : "delete"](target.id);
      let current = "";
      for (const [id, link] of links) {
        link.removeAttribute("aria-current");
        if (!current && seen.has(id)) current = id;
      }
      if (current) links.get(current).setAttribute("aria-current", "true");
    },
    { rootMargin: "-10% 0px -60% 0px" },
  );
  for (const section of document.querySelectorAll("main > section")) observer.observe(section);
})();
