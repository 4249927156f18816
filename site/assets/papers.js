// Search over the bibliography. The list comes as a script (pages opened from a folder may not read JSON)
// and is shown a page at a time.
(function () {
  "use strict";
  var STEP = 50;
  var form = document.getElementById("find");
  var list = document.getElementById("papers");
  var more = document.getElementById("more");
  var status = document.getElementById("status");
  var rows = [];
  var found = [];
  var shown = 0;
  var topics = [];
  var venues = [];

  function fields() {
    return new FormData(form);
  }

  function search() {
    var data = fields();
    var words = (data.get("q") || "").toLowerCase().split(/\s+/).filter(Boolean);
    var topic = data.get("topic") ? topics.indexOf(data.get("topic")) : -1;
    var from = Number(data.get("from")) || 0;
    var to = Number(data.get("to")) || 0;
    found = rows.filter(function (row) {
      if (topic >= 0 && row[5].indexOf(topic) < 0) return false;
      if (from && row[1] < from) return false;
      if (to && (row[1] > to || !row[1])) return false;
      if (data.get("code") && !row[4]) return false;
      if (data.get("card") && !row[6].length) return false;
      return words.every(function (word) { return row.text.indexOf(word) >= 0; });
    });
    list.textContent = "";
    shown = 0;
    page();
    status.textContent = found.length === 0 ? "No paper matches."
      : found.length.toLocaleString("en") + (found.length === 1 ? " paper" : " papers") + ", newest first";
  }

  function link(href, text) {
    var a = document.createElement("a");
    a.href = href;
    a.textContent = text;
    return a;
  }

  function page() {
    var end = Math.min(shown + STEP, found.length);
    for (; shown < end; shown++) list.appendChild(item(found[shown]));
    more.hidden = shown >= found.length;
    more.textContent = "Show " + Math.min(STEP, found.length - shown) + " more of " + (found.length - shown).toLocaleString("en");
  }

  function item(row) {
    var li = document.createElement("li");
    li.appendChild(row[3] ? link(row[3], row[0]) : document.createTextNode(row[0]));
    var sub = document.createElement("span");
    sub.className = "sub";
    var names = row[5].map(function (index) { return topics[index].replace(/-/g, " "); });
    sub.textContent = [row[1] || "undated", venues[row[2]], names.join(", ")].filter(Boolean).join(" · ");
    if (row[4]) sub.append(" · ", link(row[4], "code"));
    row[6].forEach(function (slug) {
      var card = link("methods/" + slug + ".html", "card: " + slug);
      card.className = "to-card";
      sub.append(" · ", card);
    });
    li.appendChild(sub);
    return li;
  }

  function write() {
    var wanted = new URLSearchParams();
    fields().forEach(function (value, name) { if (value) wanted.set(name, value); });
    var fragment = wanted.toString();
    history.replaceState(null, "", location.pathname + location.search + (fragment ? "#" + fragment : ""));
  }

  function read() {
    var fragment = location.hash.slice(1);
    if (fragment && fragment.indexOf("=") < 0) return;
    var wanted = new URLSearchParams(fragment);
    Array.from(form.elements).forEach(function (field) {
      if (field.type === "checkbox") field.checked = wanted.has(field.name);
      else field.value = wanted.get(field.name) || "";
    });
    search();
  }

  function start() {
    var data = window.zooPapers;
    rows = data.rows;
    topics = data.topics;
    venues = data.venues;
    rows.forEach(function (row) { row.text = (row[0] + " " + venues[row[2]]).toLowerCase(); });
    form.addEventListener("submit", function (event) { event.preventDefault(); });
    var waiting = 0;
    form.addEventListener("input", function () {
      clearTimeout(waiting);
      waiting = setTimeout(function () { write(); search(); }, 120);
    });
    more.addEventListener("click", function () {
      var first = shown;
      page();
      var next = list.children[first];
      if (next && next.querySelector("a")) next.querySelector("a").focus();
    });
    addEventListener("hashchange", read);
    search();
    read();
  }

  var script = document.createElement("script");
  script.src = list.dataset.index;
  script.onload = start;
  script.onerror = function () { status.textContent = "The list could not be loaded; the pages by year hold all papers."; };
  document.head.appendChild(script);
})();
