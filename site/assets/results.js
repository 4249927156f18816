// A family's results: show the groups of one model or one kind of hardware. The choice is kept in the fragment of the
// address, #model=smollm2-135m&hardware=..., so that it can be linked to.
(function () {
  "use strict";
  var form = document.getElementById("filter");
  var choices = Array.from(form.querySelectorAll("select"));
  var fronts = Array.from(document.querySelectorAll(".front"));

  function read() {
    var fragment = location.hash.slice(1);
    if (fragment && fragment.indexOf("=") < 0) return; // an ordinary anchor
    var wanted = new URLSearchParams(fragment);
    choices.forEach(function (choice) {
      choice.value = wanted.get(choice.name) || "";
      if (choice.selectedIndex < 0) choice.value = "";
    });
    show();
  }

  function show() {
    var shown = 0;
    fronts.forEach(function (front) {
      var fits = choices.every(function (choice) { return !choice.value || front.dataset[choice.name] === choice.value; });
      front.hidden = !fits;
      if (fits) shown += 1;
    });
    document.querySelectorAll(".goal").forEach(function (goal) {
      goal.hidden = !goal.querySelector(".front:not([hidden])");
    });
    document.getElementById("status").textContent =
      (shown < fronts.length ? shown + " of " : "") + fronts.length + (fronts.length === 1 ? " group" : " groups") + " of like runs";
  }

  form.addEventListener("submit", function (event) { event.preventDefault(); });
  form.addEventListener("change", function () {
    var chosen = new URLSearchParams();
    choices.forEach(function (choice) { if (choice.value) chosen.set(choice.name, choice.value); });
    try {
      history.replaceState(null, "", location.pathname + location.search + (String(chosen) ? "#" + chosen : ""));
    } catch (error) {
      location.replace("#" + (String(chosen) || "model="));
    }
    show();
  });
  addEventListener("hashchange", read);
  read();
  show();
})();
