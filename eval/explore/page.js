// Run once for each part of the page, with its `element` and `trigger`: tips under the pointer, choices, the picture.
const tip = document.querySelector(".depth-tip") || document.body.appendChild(document.createElement("div"));
tip.className = "depth-tip";

const show = (event) => {
  const target = event.target.closest("[data-tip]");
  tip.hidden = !target;
  if (!target) return;
  tip.textContent = target.dataset.tip;
  const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(left, 4)}px`;
  tip.style.top = `${event.clientY + 18}px`;
};
element.addEventListener("mousemove", show);
element.addEventListener("mouseleave", () => { tip.hidden = true; });

const savePicture = (name) => {
  const drawing = element.querySelector("svg.heatmap");
  const [width, height] = [drawing.width.baseVal.value, drawing.height.baseVal.value];
  const picture = new Image();
  picture.onload = () => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 2 * width, height: 2 * height });
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    const link = Object.assign(document.createElement("a"), { download: name, href: canvas.toDataURL("image/png") });
    link.click();
  };
  picture.src = `data:image/svg+xml,${encodeURIComponent(new XMLSerializer().serializeToString(drawing))}`;
};

element.addEventListener("click", (event) => {
  tip.hidden = true;
  const data = event.target.closest("[data-token], [data-sublayer], [data-picture]")?.dataset;
  if (!data) return;
  if (data.picture) savePicture(data.picture);
  else if (data.sublayer) trigger("select", { sublayer: Number(data.sublayer), source: Number(data.source) });
  else trigger("select", { token: data.token === "" ? null : Number(data.token) });
});
