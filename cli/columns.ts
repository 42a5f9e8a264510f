/** Texts side by side: lines of a width, counted as terminals do; used by compare. */

const segmenter = new Intl.Segmenter(undefined, { granularity: "grapheme" });

/** Columns that a character takes: East Asian wide ones and pictures take two. */
function widthOf(grapheme: string): number {
  if (/^\p{M}|^\p{Cc}/u.test(grapheme)) return 0;
  const wide =
    /^[\p{Script=Han}\p{Script=Hangul}\p{Script=Hiragana}\p{Script=Katakana}\p{Emoji_Presentation}\u3000-\u303f\uff01-\uff60]/u;
  return wide.test(grapheme) ? 2 : 1;
}

/** Columns that a text takes on a line. */
export function textWidth(text: string): number {
  let width = 0;
  for (const { segment } of segmenter.segment(text)) width += widthOf(segment);
  return width;
}

/** Breaks a text into lines of at most `width` columns, behind spaces where there are some; control characters are shown as their pictures. */
export function wrapText(text: string, width: number): string[] {
  const lines: string[] = [];
  const visible = text.replaceAll("\t", "    ").replaceAll(
    // deno-lint-ignore no-control-regex -- what would move a terminal's cursor
    /[\x00-\x09\x0b-\x1f\x7f]/g,
    (c) =>
      c === "\x7f" ? "\u2421" : String.fromCharCode(0x2400 + c.charCodeAt(0)),
  );
  for (const paragraph of visible.split("\n")) {
    let line = "";
    let taken = 0;
    // Where the line may be broken: behind its last space.
    let space = 0;
    for (const { segment } of segmenter.segment(paragraph)) {
      const more = widthOf(segment);
      if (taken + more > width) {
        const cut = space > 0 && segment !== " " ? space : line.length;
        lines.push(line.slice(0, cut).trimEnd());
        line = line.slice(cut);
        taken = textWidth(line);
        space = 0;
        // The space that a line breaks at belongs to neither.
        if (segment === " ") continue;
      }
      line += segment;
      taken += more;
      if (segment === " ") space = line.length;
    }
    lines.push(line.trimEnd());
  }
  return lines;
}

/**
 * Sets texts side by side below their titles, or one below the other where a
 * column would have fewer than `least` columns.
 */
export function sideBySide(
  texts: readonly { title: string; text: string }[],
  columns: number,
  least = 24,
): string {
  const gap = " | ";
  const width = Math.floor(
    (columns - gap.length * (texts.length - 1)) / texts.length,
  );
  if (width < least) {
    return texts.map(({ title, text }) =>
      `${title}\n${wrapText(text, columns).join("\n")}\n`
    ).join("\n");
  }
  const blocks = texts.map(({ title, text }) => [
    ...wrapText(title, width),
    "-".repeat(width),
    ...wrapText(text, width),
  ]);
  const height = Math.max(...blocks.map((block) => block.length));
  return Array.from({ length: height }, (_, i) =>
    blocks.map((block) => {
      const line = block[i] ?? "";
      return line + " ".repeat(Math.max(0, width - textWidth(line)));
    }).join(gap).trimEnd() + "\n").join("");
}
