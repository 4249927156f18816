// The table of methods: filters, search and sorting. Its state is the fragment of the address,
// #where=before-llm,attention&training=none&q=merge&sort=-year, so that a selection can be linked to.
// Answers to one question are alternatives; questions, properties and words must all hold.
(function () {
  "use strict";
  var form = document.getElementById("filters");
  var table = document.getElementById("methods");
  var body = table.tBodies[0];
  var boxes = Array.from(form.querySelectorAll("input[type=checkbox]"));
  var search = document.getElementById("q");
  var rows = Array.from(body.rows).map(function (row, index) {
    return {
      row: row,
      index: index,
      tokens: new Set(row.dataset.t.split(" ")),
      text: (row.textContent + " " + row.dataset.s).toLowerCase()
    };
  });
  var columns = Array.from(table.tHead.rows[0].cells);
  var names = columns.map(function (cell) { return cell.dataset.sort; });
  var labels = new Map(boxes.map(function (box) { return [box, labelOf(box)]; }));
  var state = { chosen: {}, words: "", sort: "" };

  function labelOf(box) {
    var pair = box.closest(".pair");
    if (pair) return pair.querySelector("span").textContent + ": " + box.value;
    var text = box.nextSibling.data.trim();
    var group = box.closest("details.group");
    return group ? group.querySelector("summary").textContent + ": " + text : text;
  }

  // --- address <-> state <-> form

  function read() {
    var fragment = location.hash.slice(1);
    if (fragment && fragment.indexOf("=") < 0) return; // an ordinary anchor, as of the skip link
    var wanted = new URLSearchParams(fragment);
    state = { chosen: {}, words: wanted.get("q") || "", sort: wanted.get("sort") || "" };
    boxes.forEach(function (box) {
      var values = (wanted.get(box.name) || "").split(",");
      box.checked = values.indexOf(box.value) >= 0;
      var group = box.closest("details.group");
      if (box.checked && group) group.open = true;
    });
    search.value = state.words;
    collect();
    show();
  }

  function collect() {
    state.chosen = {};
    boxes.forEach(function (box) {
      if (box.checked) (state.chosen[box.name] = state.chosen[box.name] || []).push(box.value);
    });
    state.words = search.value.trim();
  }

  function write() {
    var parts = Object.keys(state.chosen).map(function (name) { return name + "=" + state.chosen[name].join(","); });
    if (state.words) parts.push("q=" + encodeURIComponent(state.words));
    if (state.sort) parts.push("sort=" + state.sort);
    var address = location.pathname + location.search + (parts.length ? "#" + parts.join("&") : "");
    try {
      history.replaceState(null, "", address);
    } catch (error) {
      location.replace(parts.length ? "#" + parts.join("&") : "#all=");
    }
  }

  function change() {
    collect();
    write();
    show();
  }

  // --- showing

  function matches(item, leftOut) {
    var words = state.words.toLowerCase().split(/\s+/);
    for (var i = 0; i < words.length; i++) if (words[i] && item.text.indexOf(words[i]) < 0) return false;
    for (var name in state.chosen) {
      if (name !== leftOut && !state.chosen[name].some(function (v) { return item.tokens.has(name + ":" + v); })) return false;
    }
    return true;
  }

  function show() {
    var shown = 0;
    rows.forEach(function (item) {
      var fits = matches(item, null);
      item.row.hidden = !fits;
      if (fits) shown += 1;
    });
    count();
    sort();
    chips();
    document.getElementById("status").textContent =
      shown === rows.length ? "All " + shown + " entries" : shown + " of " + rows.length + " entries";
    document.getElementById("none").hidden = shown > 0;
  }

  // Beside each answer: how many entries it would give, the other questions being as they are.
  function count() {
    var fitting = {};
    boxes.forEach(function (box) {
      var place = box.parentNode.querySelector(".n");
      if (!place) return;
      fitting[box.name] = fitting[box.name] || rows.filter(function (item) { return matches(item, box.name); });
      var number = fitting[box.name].filter(function (item) { return item.tokens.has(box.name + ":" + box.value); }).length;
      place.textContent = number;
      box.parentNode.classList.toggle("zero", number === 0 && !box.checked);
    });
  }

  function sort() {
    var down = state.sort.charAt(0) === "-";
    var column = names.indexOf(down ? state.sort.slice(1) : state.sort);
    columns.forEach(function (cell, index) {
      if (index === column) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    var order = rows.slice();
    if (column >= 0) {
      var numeric = names[column] === "year";
      order.forEach(function (item) {
        var text = item.row.cells[column].textContent;
        item.key = numeric ? Number(text) : text.trim().toLowerCase();
      });
      order.sort(function (a, b) {
        var compared = numeric ? a.key - b.key : a.key.localeCompare(b.key, "en");
        return (down ? -compared : compared) || a.index - b.index;
      });
    }
    if (order.some(function (item, index) { return body.rows[index] !== item.row; })) {
      var all = document.createDocumentFragment();
      order.forEach(function (item) { all.appendChild(item.row); });
      body.appendChild(all);
    }
  }

  function chips() {
    var place = document.getElementById("chips");
    place.textContent = "";
    var any = state.words !== "";
    boxes.forEach(function (box) {
      if (!box.checked) return;
      any = true;
      var chip = document.createElement("button");
      chip.type = "button";
      chip.className = "chip";
      chip.textContent = labels.get(box);
      chip.setAttribute("aria-label", "Remove filter: " + labels.get(box));
      chip.addEventListener("click", function () {
        box.checked = false;
        change();
        search.focus();
      });
      place.appendChild(chip);
    });
    document.getElementById("reset").hidden = !any;
  }

  // --- wiring

  columns.forEach(function (cell, index) {
    var button = document.createElement("button");
    button.type = "button";
    button.textContent = cell.textContent;
    cell.textContent = "";
    cell.appendChild(button);
    button.addEventListener("click", function () {
      var name = names[index];
      var first = name === "year" || name === "runs" ? "-" + name : name;
      var second = first === name ? "-" + name : name;
      state.sort = state.sort === first ? second : state.sort === second ? "" : first;
      write();
      sort();
    });
  });
  form.addEventListener("submit", function (event) { event.preventDefault(); });
  form.addEventListener("change", change);
  search.addEventListener("input", change);
  document.getElementById("reset").addEventListener("click", function () {
    boxes.forEach(function (box) { box.checked = false; });
    search.value = "";
    change();
    search.focus();
  });
  addEventListener("hashchange", read);
  if (matchMedia("(min-width: 60rem)").matches) document.getElementById("panel").open = true;
  read();
  show();
})();
