const specs = JSON.parse(document.getElementById("charts").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const views = new Map();
const options = () => ({
  renderer: "svg",
  actions: { export: true, source: false, compiled: false, editor: false },
  tooltip: { theme: dark.matches ? "dark" : "light" },
});
for (const place of document.querySelectorAll("[data-chart]")) {
  try {
    const { view } = await vegaEmbed(place, specs[place.dataset.chart], options());
    views.set(place.dataset.chart, view);
  } catch (error) {
    console.error(error);
    place.textContent = `This chart cannot be drawn: ${error.message}`;
  }
}
for (const choice of document.querySelectorAll("[name=xaxis]")) {
  choice.addEventListener("change", () => {
    for (const [name, view] of views) {
      if (name.startsWith("curve-")) view.signal("xaxis", choice.value).runAsync();
    }
  });
}
for (const slider of document.querySelectorAll(".stages input")) {
  const shown = slider.parentElement.querySelectorAll(".stage");
  slider.addEventListener("input", () => {
    shown.forEach((stage, i) => stage.classList.toggle("on", i === Number(slider.value)));
  });
}
// On paper nothing can be opened.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => {
  if (!d.closest(".vega-embed")) d.open = true;
}));
document.body.dataset.ready = String(views.size);
