"use strict";
// Sorting, filtering and expanding; without this script the report shows everything in the order of the zoo.
(() => {
  const tables = Array.from(document.querySelectorAll("table.groups"));
  const query = document.getElementById("query");
  const boxes = Array.from(document.querySelectorAll("input[name=family]"));
  const status = document.getElementById("status");
  const text = new Intl.Collator("en", { numeric: true });

  function setOpen(group, open) {
    group.classList.toggle("open", open);
    group.querySelector(".expand")?.setAttribute("aria-expanded", String(open));
  }

  // A cell with data-value is a number, and an empty one a missing number; any other cell is text.
  function key(group, column) {
    const cell = group.rows[0].cells[column];
    if (cell.dataset.value === undefined) {
      return cell.textContent.trim();
    }
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  }

  function compare(first, second) {
    return typeof first === "number" ? first - second : text.compare(first, second);
  }

  function sort(table, head) {
    const ascending = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.cells) {
      other.removeAttribute("aria-sort");
    }
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const keyed = Array.from(table.tBodies, (group) => [key(group, head.cellIndex), group]);
    keyed.sort(([first], [second]) => {
      if (first === null || second === null) {
        return (first === null) - (second === null);
      }
      return ascending ? compare(first, second) : compare(second, first);
    });
    table.append(...keyed.map(([, group]) => group));
  }

  function makeSortable(table) {
    for (const head of Array.from(table.tHead.rows).pop().cells) {
      if (head.tagName !== "TH") {
        continue;
      }
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sort(table, head));
    }
  }

  function addExpandAll(table) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "all";
    button.textContent = "Expand all";
    button.addEventListener("click", () => {
      const open = button.textContent === "Expand all";
      for (const group of table.tBodies) {
        setOpen(group, open);
      }
      button.textContent = open ? "Collapse all" : "Expand all";
    });
    table.closest(".card").querySelector(".bar").append(button);
  }

  function filter() {
    const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    const families = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    let shown = 0;
    let total = 0;
    for (const table of tables) {
      let left = 0;
      for (const group of table.tBodies) {
        const { search, family } = group.dataset;
        group.hidden = !((family === undefined || families.has(family)) && words.every((word) => search.includes(word)));
        left += group.hidden ? 0 : 1;
      }
      table.closest(".card").querySelector(".none").hidden = left > 0;
      shown += left;
      total += table.tBodies.length;
    }
    status.textContent = shown === total ? "" : `${shown} of ${total} rows shown`;
  }

  function openTarget() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const group = target && target.closest("tbody");
    if (!group) {
      return;
    }
    group.hidden = false;
    setOpen(group, true);
    group.scrollIntoView({ block: "start" });
  }

  for (const table of tables) {
    makeSortable(table);
    if (table.querySelector(".expand")) {
      addExpandAll(table);
    }
    for (const group of table.tBodies) {
      setOpen(group, false);
    }
    table.addEventListener("click", (event) => {
      const button = event.target.closest(".expand");
      if (button) {
        setOpen(button.closest("tbody"), button.getAttribute("aria-expanded") === "false");
      }
    });
  }
  for (const picture of document.querySelectorAll(".zoom")) {
    picture.addEventListener("click", () => {
      picture.setAttribute("aria-pressed", String(picture.getAttribute("aria-pressed") === "false"));
    });
  }
  document.getElementById("filter").addEventListener("submit", (event) => event.preventDefault());
  query.addEventListener("input", filter);
  boxes.forEach((box) => box.addEventListener("change", filter));
  window.addEventListener("hashchange", openTarget);
  document.documentElement.classList.add("scripted");
  filter();
  openTarget();
})();
