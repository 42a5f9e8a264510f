/** lineChart(): a line chart as one SVG text, without a dependency; used by reports and `--svg`. */

/** A point; `error` draws a bar of that length up and down. */
export interface ChartPoint {
  /** Across. */
  x: number;
  /** Up. */
  y: number;
  /** Half of the error bar. */
  error?: number;
}

/** One line. */
export interface ChartSeries {
  /** Its name. */
  name: string;
  /** Its points, in any order. */
  points: readonly ChartPoint[];
  /** Draws it dashed and without markers in the colour of the series before it, whose bound it is. @default `false` */
  bound?: boolean;
}

/** What is drawn. */
export interface ChartOptions {
  /** What the chart shows. */
  title: string;
  /** Quantity and unit across. */
  xLabel: string;
  /** Quantity and unit up. */
  yLabel: string;
  /** How x is spaced. @default `"linear"` */
  xScale?: "linear" | "log";
  /** A height that is shown whatever the points are, such as 0. @default none */
  base?: number;
  /** The lines. */
  series: readonly ChartSeries[];
}

const WIDTH = 760;
const HEIGHT = 420;
const LEFT = 70;
/** The least room for the legend. */
const RIGHT = 210;
/** What a letter takes. */
const LETTER = 7.5;
const TOP = 48;
const BOTTOM = 56;
/** Colours that colour-blind people tell apart (Okabe and Ito 2008), without the yellow that white swallows. */
const COLOURS = [
  "#0072b2",
  "#d55e00",
  "#009e73",
  "#cc79a7",
  "#56b4e9",
  "#e69f00",
  "#000000",
];
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];

/** Escapes text for SVG and HTML. */
export function escapeText(text: string): string {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;")
    .replaceAll(">", "&gt;").replaceAll('"', "&quot;");
}

/**
 * Draws lines with markers, error bars, round ticks and a legend.
 *
 * @throws {RangeError} A coordinate is not finite, or x is not above 0 where its
 * scale is logarithmic.
 */
export function lineChart(options: ChartOptions): string {
  checkPoints(options);
  const plot = plotOf(options);
  const title = escapeText(options.title);
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" font-family="system-ui, sans-serif" font-size="13">`,
    `<title>${title}</title>`,
    `<rect width="${WIDTH}" height="${HEIGHT}" fill="#ffffff"/>`,
    `<text x="${LEFT}" y="24" font-size="16" font-weight="600">${title}</text>`,
    ...axes(options, plot),
    ...lines(options.series, plot),
    "</svg>",
  ].join("\n") + "\n";
}

function checkPoints({ xScale, series }: ChartOptions): void {
  for (const { x, y, error = 0 } of series.flatMap(({ points }) => points)) {
    if (![x, y, error].every(Number.isFinite) || (xScale === "log" && x <= 0)) {
      throw new RangeError(
        `The points of a chart must be finite${
          xScale === "log" ? ", with x above 0" : ""
        }: current value is (${x}, ${y})`,
      );
    }
  }
}

/** Where things lie. */
interface Plot {
  /** Its right edge, where the legend begins. */
  right: number;
  /** Values that are named across. */
  xTicks: readonly number[];
  /** Values that are named up. */
  yTicks: readonly number[];
  /** A value's place across. */
  left: (x: number) => number;
  /** A value's place down. */
  top: (y: number) => number;
}

function plotOf({ xScale = "linear", base, series }: ChartOptions): Plot {
  const points = series.flatMap(({ points }) => points);
  const longest = Math.max(0, ...series.map(({ name }) => name.length));
  const right = WIDTH - Math.max(RIGHT, 52 + Math.ceil(longest * LETTER));
  const across = (x: number) => xScale === "log" ? Math.log2(x) : x;
  const xs = points.map(({ x }) => x);
  const ys = points.flatMap(({ y, error = 0 }) => [y - error, y + error])
    .concat(base ?? []);
  const [x0, x1] = widened(xs.map(across));
  const yTicks = roundTicks(...widened(ys));
  const [y0, y1] = [yTicks[0]!, yTicks.at(-1)!];
  const left = (x: number) =>
    LEFT + (across(x) - x0) / (x1 - x0) * (right - LEFT);
  const top = (y: number) =>
    HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
  // Few places across are named themselves, as are those of a logarithmic
  // scale, where round numbers lie anywhere; the last one has room first.
  const own = [...new Set(xs)].sort((a, b) => a - b);
  const xTicks = own.length > 8 && xScale === "linear"
    ? roundTicks(x0, x1).filter((x) => x >= x0 && x <= x1)
    : apart(own, left);
  return { right, xTicks, yTicks, left, top };
}

/** The lines behind the plot, both axes and their names. */
function axes({ xLabel, yLabel }: ChartOptions, plot: Plot): string[] {
  const { right, left, top } = plot;
  const foot = HEIGHT - BOTTOM;
  return [
    ...plot.yTicks.flatMap((y) => [
      `<line x1="${LEFT}" x2="${right}" y1="${at(top(y))}" y2="${
        at(top(y))
      }" stroke="#dddddd"/>`,
      `<text x="${LEFT - 8}" y="${at(top(y) + 4)}" text-anchor="end">${
        label(y)
      }</text>`,
    ]),
    ...plot.xTicks.flatMap((x) => [
      `<line x1="${at(left(x))}" x2="${at(left(x))}" y1="${foot}" y2="${
        foot + 5
      }" stroke="#333333"/>`,
      `<text x="${at(left(x))}" y="${foot + 20}" text-anchor="middle">${
        label(x)
      }</text>`,
    ]),
    `<line x1="${LEFT}" x2="${right}" y1="${foot}" y2="${foot}" stroke="#333333"/>`,
    `<text x="${(LEFT + right) / 2}" y="${HEIGHT - 14}" text-anchor="middle">${
      escapeText(xLabel)
    }</text>`,
    `<text transform="translate(18 ${
      (TOP + foot) / 2
    }) rotate(-90)" text-anchor="middle">${escapeText(yLabel)}</text>`,
  ];
}

/** Every line with its markers and its place in the legend. */
function lines(series: readonly ChartSeries[], plot: Plot): string[] {
  const step = Math.min(18, (HEIGHT - TOP - 20) / Math.max(1, series.length));
  let styles = -1;
  return series.flatMap(({ name, points, bound = false }, i) => {
    if (!bound || i === 0) styles++;
    const colour = COLOURS[styles % COLOURS.length]!;
    const dash = bound
      ? "2 4"
      : DASHES[Math.floor(styles / COLOURS.length) % DASHES.length]!;
    const style = `stroke="${colour}" stroke-width="2" fill="none"${
      dash ? ` stroke-dasharray="${dash}"` : ""
    }`;
    const sorted = points.toSorted((a, b) => a.x - b.x);
    const line = sorted.map(({ x, y }) =>
      `${at(plot.left(x))},${at(plot.top(y))}`
    );
    const y = TOP + 6 + i * step;
    const x = plot.right + 16;
    return [
      ...line.length > 1
        ? [`<polyline points="${line.join(" ")}" ${style}/>`]
        : [],
      ...(bound ? [] : sorted).flatMap((point) =>
        marker(name, point, colour, plot)
      ),
      `<line x1="${x}" x2="${x + 22}" y1="${at(y)}" y2="${at(y)}" ${style}/>`,
      `<text x="${x + 28}" y="${at(y + 4)}">${escapeText(name)}</text>`,
    ];
  });
}

/** A point, which tells its values, with its error bar. */
function marker(
  name: string,
  { x, y, error = 0 }: ChartPoint,
  colour: string,
  { left, top }: Plot,
): string[] {
  const bar = `<line x1="${at(left(x))}" x2="${at(left(x))}" y1="${
    at(top(y - error))
  }" y2="${at(top(y + error))}" stroke="${colour}"/>`;
  const circle = `<circle cx="${at(left(x))}" cy="${
    at(top(y))
  }" r="3.5" fill="${colour}"><title>${
    escapeText(`${name}: ${label(x)}, ${label(y)}`)
  }</title></circle>`;
  return error > 0 ? [bar, circle] : [circle];
}

/** Those of ascending values whose names do not run into each other. */
function apart(
  values: readonly number[],
  place: (value: number) => number,
): number[] {
  const half = (value: number) => label(value).length * LETTER / 2;
  const named: number[] = [];
  for (const value of values.toReversed()) {
    const next = named.at(-1);
    if (
      next === undefined ||
      place(next) - half(next) - 8 >= place(value) + half(value)
    ) named.push(value);
  }
  return named.reverse();
}

/** The least and the most, apart even where all values are equal. */
function widened(values: readonly number[]): [number, number] {
  if (values.length === 0) return [0, 1];
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (high > low) return [low, high];
  const room = Math.abs(low) / 10 || 1;
  return [low - room, high + room];
}

/** Multiples of 1, 2 or 5 times a power of ten that enclose a range. */
function roundTicks(low: number, high: number): number[] {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((n) => n * power >= rough)!;
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  return Array.from(
    { length: last - first + 1 },
    (_, i) => Number(((first + i) * step).toPrecision(12)),
  );
}

function at(place: number): string {
  return place.toFixed(1);
}

function label(value: number): string {
  const short = Number.isSafeInteger(value)
    ? value
    : Number(value.toPrecision(5));
  return Math.abs(short) >= 1e3 && Math.abs(short) < 1e7
    ? short.toLocaleString("en-US")
    : String(short);
}
