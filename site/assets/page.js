// Loaded in the head of every page: colour scheme before the first paint, then the theme and copy buttons.
(function () {
  "use strict";
  var page = document.documentElement;
  page.classList.add("js");

  function stored() {
    try { return localStorage.getItem("zoo-theme"); } catch (error) { return null; }
  }
  function store(theme) {
    try { localStorage.setItem("zoo-theme", theme); } catch (error) { /* private mode: lasts for this page */ }
  }
  var asked = stored();
  if (asked === "dark" || asked === "light") page.dataset.theme = asked;

  function isDark() {
    return page.dataset.theme ? page.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function wireTheme(button) {
    function label() { button.textContent = isDark() ? "Light" : "Dark"; }
    label();
    button.setAttribute("aria-label", "Switch colour scheme");
    button.addEventListener("click", function () {
      page.dataset.theme = isDark() ? "light" : "dark";
      store(page.dataset.theme);
      label();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
  }

  // The clipboard interface is missing on some pages opened from a folder; a selection can still be copied there.
  function copySelection(element) {
    var range = document.createRange();
    range.selectNodeContents(element);
    var selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    return document.execCommand("copy");
  }

  function wireCopy(button) {
    var label = button.firstChild;
    var said = label.data;
    function tell(worked) {
      label.data = worked ? "Copied" : "Press Ctrl+C";
      setTimeout(function () { label.data = said; }, 1600);
    }
    button.setAttribute("aria-live", "polite");
    button.addEventListener("click", function () {
      var source = document.getElementById(button.dataset.copy);
      if (navigator.clipboard) {
        navigator.clipboard.writeText(source.textContent).then(
          function () { tell(true); },
          function () { tell(copySelection(source)); }
        );
      } else {
        tell(copySelection(source));
      }
    });
  }

  document.addEventListener("DOMContentLoaded", function () {
    document.querySelectorAll("[data-theme-toggle]").forEach(wireTheme);
    document.querySelectorAll("[data-copy]").forEach(wireCopy);
    // A glossary entry that was linked to shows its methods at once.
    function open() {
      var target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
      var details = target && target.querySelector("details");
      if (details) details.open = true;
    }
    open();
    addEventListener("hashchange", open);
  });
})();
