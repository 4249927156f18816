// Two to four methods side by side. The choice is the fragment of the address, #flap,cfsp. The data of
// some methods each is in small scripts, loaded when one of them is chosen, so that this also works on a page opened
// from a folder.
(function () {
  "use strict";
  var SVG = "http://www.w3.org/2000/svg";
  var MARKS = ["c-one", "c-two", "c-three", "c-four"];
  var inputs = Array.from(document.querySelectorAll("#choose input"));
  var known = new Map(Array.from(document.querySelectorAll("#known option")).map(function (option) {
    return [option.value, option.dataset.file];
  }));
  var table = document.getElementById("versus");
  var loaded = {}, scripts = {};

  window.zooMethod = function (method) { loaded[method.slug] = method; };

  function make(tag, text, parent, name) {
    var element = document.createElement(tag);
    if (text !== null) element.textContent = text;
    if (name) element.className = name;
    if (parent) parent.appendChild(element);
    return element;
  }

  function draw(tag, attributes, parent, text) {
    var element = document.createElementNS(SVG, tag);
    Object.keys(attributes).forEach(function (name) { element.setAttribute(name, attributes[name]); });
    if (text) element.textContent = text;
    parent.appendChild(element);
    return element;
  }

  function fetchMethod(slug) {
    return load(known.get(slug)).then(function () { return loaded[slug]; }, function () { throw new Error(slug); });
  }

  function load(name) {
    scripts[name] = scripts[name] || new Promise(function (resolve, reject) {
      var script = document.createElement("script");
      script.src = table.dataset.from + name + ".js";
      script.onload = resolve;
      script.onerror = function () { delete scripts[name]; reject(); };
      document.head.appendChild(script);
    });
    return scripts[name];
  }

  function chosen() {
    var slugs = inputs.map(function (input) { return input.value.trim(); });
    return slugs.filter(function (slug, index) { return known.has(slug) && slugs.indexOf(slug) === index; });
  }

  function read() {
    var slugs = decodeURIComponent(location.hash.slice(1)).split(",");
    if (slugs.some(function (slug) { return known.has(slug); })) {
      inputs.forEach(function (input, index) { input.value = slugs[index] || ""; });
    }
    show();
  }

  function change() {
    var fragment = chosen().join(",");
    try {
      history.replaceState(null, "", location.pathname + location.search + (fragment ? "#" + fragment : ""));
    } catch (error) {
      location.replace("#" + fragment);
    }
    show();
  }

  function show() {
    var slugs = chosen();
    var status = document.getElementById("status");
    document.getElementById("side-by-side").hidden = slugs.length < 2;
    document.getElementById("chart").hidden = true;
    if (slugs.length < 2) {
      status.textContent = slugs.length ? "Choose one more method." : "Choose two methods.";
      return;
    }
    Promise.all(slugs.map(fetchMethod)).then(function (methods) {
      if (chosen().join() !== slugs.join()) return; // the choice has changed meanwhile
      status.textContent = methods.map(function (method) { return method.name; }).join(", ");
      fill(methods);
      plot(methods);
    }, function (error) { status.textContent = "The data of " + error.message + " could not be loaded."; });
  }

  // --- the table

  function fill(methods) {
    table.textContent = "";
    var head = make("tr", null, make("thead", null, table));
    make("th", "", head).scope = "col";
    methods.forEach(function (method, index) {
      var cell = make("th", null, head);
      cell.scope = "col";
      make("span", "", cell, "key " + MARKS[index]);
      make("a", method.name, cell).href = "methods/" + method.slug + ".html";
    });
    var body = make("tbody", null, table);
    row(body, methods, "Idea", function (method) { return method.summary; });
    row(body, methods, "Year", function (method) { return method.venue ? method.year + ", " + method.venue : String(method.year); });
    row(body, methods, "Runs here", function (method) { return method.runs ? "yes" : "no"; });
    names(methods, "facets").forEach(function (facet) {
      row(body, methods, facet, function (method) { return (method.facets[facet] || []).join(", "); });
    });
    names(methods, "properties").forEach(function (property) {
      row(body, methods, property, function (method) {
        return property in method.properties ? (method.properties[property] ? "yes" : "no") : "";
      });
    });
    names(methods, "parameters").forEach(function (name) {
      row(body, methods, "Parameter " + name, function (method) { return method.parameters[name] || ""; });
    });
    lists(body, methods, "Reported", function (method) {
      return method.claims.map(function (claim) {
        var without = claim[4] === null ? "" : " (without: " + claim[4] + ")";
        var about = [claim[0], claim[1], claim[3], claim[6]].filter(Boolean).join("; ");
        return [claim[2] + ": " + claim[5] + without, about];
      });
    });
    lists(body, methods, "Measured", function (method) {
      return method.points.map(function (point) {
        return [point.times.toFixed(2) + "× " + point.gain.split(",")[0] + ", " + (100 * point.kept).toFixed(1) + "% of " + point.quality,
          [point.setting, point.model, point.hardware].join("; ")];
      });
    });
    names(methods.reduce(function (points, method) { return points.concat(method.points); }, []), "tasks").forEach(function (task) {
      row(body, methods, "Gain on " + task, function (method) {
        var own = method.points.filter(function (point) { return task in point.tasks; });
        return own.map(function (point) { return point.tasks[task].toFixed(2) + "×"; }).join(", ");
      });
    });
  }

  function names(methods, group) {
    var found = [];
    methods.forEach(function (method) {
      Object.keys(method[group]).forEach(function (name) { if (found.indexOf(name) < 0) found.push(name); });
    });
    return found;
  }

  function row(body, methods, label, text) {
    var texts = methods.map(text);
    var line = make("tr", null, body, texts.every(function (value) { return value === texts[0]; }) ? "same" : "");
    make("th", label, line).scope = "row";
    texts.forEach(function (value) { make("td", value || "–", line); });
  }

  function lists(body, methods, label, entries) {
    var line = make("tr", null, body);
    make("th", label, line).scope = "row";
    methods.forEach(function (method) {
      var cell = make("td", null, line);
      var found = entries(method);
      if (!found.length) cell.textContent = "nothing";
      var list = found.length ? make("ul", null, cell, "plain") : null;
      found.forEach(function (entry) { make("span", entry[1], make("li", entry[0], list), "sub"); });
    });
  }

  // --- the curves: only points of the same model, hardware, gain and quality share a picture

  function plot(methods) {
    var groups = {};
    methods.forEach(function (method, index) {
      method.points.forEach(function (point) {
        var key = JSON.stringify([point.model, point.hardware, point.gain, point.quality]);
        (groups[key] = groups[key] || []).push({ at: index, point: point });
      });
    });
    function shared(key) { return new Set(groups[key].map(function (entry) { return entry.at; })).size; }
    var best = Object.keys(groups).sort(function (a, b) { return shared(b) - shared(a) || groups[b].length - groups[a].length; })[0];
    if (!best) return;
    var about = JSON.parse(best);
    document.getElementById("setting").textContent = "On " + about[0] + ", " + about[1] + ". The ring is the unmodified model.";
    var points = groups[best];
    // Where nothing is lost all points would lie at one height; the table has their gains task by task.
    if (points.every(function (entry) { return entry.point.kept === 1 && Object.keys(entry.point.tasks).length; })) return;
    var xs = range(points.map(function (entry) { return entry.point.times; }));
    var ys = range(points.map(function (entry) { return entry.point.kept; }));
    function x(value) { return 62 + (value - xs[0]) / (xs[1] - xs[0]) * 636; }
    function y(value) { return 332 - (value - ys[0]) / (ys[1] - ys[0]) * 302; }
    var place = document.getElementById("plot");
    place.textContent = "";
    var svg = draw("svg", { "class": "chart", viewBox: "0 0 720 380", role: "img",
      "aria-label": about[3] + " kept against " + about[2] }, place);
    ticks(xs[0], xs[1], 8).forEach(function (value) {
      draw("path", { "class": "c-grid", d: "M" + x(value) + " 30V332" }, svg);
      draw("text", { "class": "c-tick", x: x(value), y: 350, "text-anchor": "middle" }, svg, value + "×");
    });
    ticks(ys[0], ys[1], 6).forEach(function (value) {
      draw("path", { "class": "c-grid", d: "M62 " + y(value) + "H698" }, svg);
      draw("text", { "class": "c-tick", x: 54, y: y(value) + 4, "text-anchor": "end" }, svg, String(value));
    });
    draw("text", { "class": "c-name", x: 698, y: 372, "text-anchor": "end" }, svg, about[2]);
    draw("text", { "class": "c-name", x: 62, y: 16 }, svg, about[3] + ", share kept");
    draw("circle", { "class": "c-base", cx: x(1), cy: y(1), r: 5 }, svg);
    methods.forEach(function (method, index) {
      var own = points.filter(function (entry) { return entry.at === index; }).map(function (entry) { return entry.point; });
      own.sort(function (a, b) { return a.times - b.times; });
      var path = own.map(function (point, number) { return (number ? "L" : "M") + x(point.times) + " " + y(point.kept); }).join("");
      if (own.length > 1) draw("path", { "class": "c-curve " + MARKS[index], d: path }, svg);
      own.forEach(function (point) {
        var dot = draw("circle", { "class": "c-point " + MARKS[index], cx: x(point.times), cy: y(point.kept), r: 4.5 }, svg);
        draw("title", {}, dot, method.name + ", " + point.setting + ": " + point.times.toFixed(2) + "×, " + (100 * point.kept).toFixed(1) + "% kept");
      });
    });
    document.getElementById("chart").hidden = false;
  }

  // At most so many round numbers, in steps of 1, 2 or 5 times a power of ten.
  function ticks(low, high, most) {
    var power = Math.pow(10, Math.floor(Math.log10((high - low) / most)));
    var step = [1, 2, 5, 10].map(function (factor) { return factor * power; })
      .find(function (size) { return Math.floor(high / size) - Math.ceil(low / size) < most; });
    var found = [];
    for (var number = Math.ceil(low / step); number * step <= high; number += 1) found.push(Number((number * step).toPrecision(6)));
    return found;
  }

  function range(values) {
    var low = Math.min.apply(null, values.concat(1)), high = Math.max.apply(null, values.concat(1));
    var room = 0.06 * (high - low) || 0.1;
    return [low - room, high + room];
  }

  document.getElementById("choose").addEventListener("submit", function (event) { event.preventDefault(); });
  inputs.forEach(function (input) { input.addEventListener("change", change); });
  addEventListener("hashchange", read);
  read();
})();
