// Sorts a table by the column whose header is pressed; without scripts the tables stand as they are.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (!table.tHead || !body || body.rows.length < 3) continue;
  const scales = { k: 1e3, M: 1e6, G: 1e9, T: 1e12, kB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12 };
  const valueOf = (row, index) => {
    const text = row.cells[index].textContent.trim();
    const found = text.replaceAll(",", "").replace("\u2212", "-").match(/^[+-]?[\d.]+(?:e[+-]?\d+)?/);
    if (!found) return text === "\u2013" || text === "" ? -Infinity : text.toLowerCase();
    return Number(found[0]) * (scales[text.slice(found[0].length).trim().split(/[\s\u00a0]/).pop()] ?? 1);
  };
  [...table.tHead.rows[0].cells].forEach((header, index) => {
    if (!header.textContent.trim()) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const rising = header.getAttribute("aria-sort") === "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const compared = (a, b) => {
        const [left, right] = [valueOf(a, index), valueOf(b, index)];
        if (typeof left === typeof right) return left < right ? -1 : left > right ? 1 : 0;
        return typeof left === "number" ? -1 : 1;
      };
      const rows = [...body.rows].sort((a, b) => (rising ? compared(a, b) : compared(b, a)));
      body.append(...rows);
    });
  });
}
