// Filters, pictures that tell of their points, and on a live page news from the server.
const { points, charts } = JSON.parse(document.getElementById("data").textContent);
const drawnBy = ({ needs, data }) => (needs ? points.filter((each) => each[needs] !== null) : data);
const form = document.querySelector(".filters");
const rows = [...document.querySelectorAll("tr[data-model]")];
const views = new Map();

const chosen = () => [...new FormData(form)].filter(([, value]) => value);
const fits = (row, asked) => asked.every(([name, value]) => row[name] === value);

async function draw(name, asked) {
  const data = drawnBy(charts[name]).filter((row) => fits(row, asked));
  const known = views.get(name);
  if (known) {
    await known.change("rows", vega.changeset().remove(() => true).insert(data)).runAsync();
    return;
  }
  const place = document.querySelector(`#chart-${name} .picture`);
  const spec = { ...charts[name].spec, data: { name: "rows", values: data } };
  const drawn = document.createElement("div");
  const made = await vegaEmbed(drawn, spec, { renderer: "svg", actions: false, ast: false });
  place.replaceChildren(drawn);
  views.set(name, made.view);
}

async function filter() {
  const asked = chosen();
  let shown = 0;
  for (const row of rows) {
    row.hidden = !fits(row.dataset, asked);
    shown += !row.hidden;
  }
  form.querySelector("output").textContent = `${shown.toLocaleString("en")} shown`;
  const hash = new URLSearchParams(asked).toString();
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  // Many points are drawn once somebody asks for fewer; until then the page's own pictures stay.
  for (const name of Object.keys(charts)) {
    if (asked.length || views.has(name) || points.length <= 2000) await draw(name, asked);
  }
}

for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
  const select = form.elements.namedItem(name);
  if (select) select.value = value;
}
form.hidden = false;
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
await filter();
document.documentElement.dataset.ready = "yes";

if ("live" in document.body.dataset) {
  const news = new EventSource("events");
  news.addEventListener("results", () => location.reload());
}
