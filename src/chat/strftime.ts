/** Dates as templates ask for them with `strftime_now`, as Python writes them; used by template.ts. */

const DAYS = [
  ..."Sunday Monday Tuesday Wednesday Thursday Friday Saturday".split(" "),
];
const MONTHS = [
  ..."January February March April May June July".split(" "),
  ..."August September October November December".split(" "),
];

/** A date and a time in a format of Python's strftime, in English. */
export function strftime(date: Date, format: string): string {
  return format.replace(/%(-?)([a-zA-Z%])/g, (found, bare, letter) => {
    const pad = (n: number, width = 2): string =>
      bare ? `${n}` : `${n}`.padStart(width, "0");
    const hours = date.getHours();
    switch (letter) {
      case "Y":
        return `${date.getFullYear()}`;
      case "y":
        return pad(date.getFullYear() % 100);
      case "m":
        return pad(date.getMonth() + 1);
      case "B":
        return MONTHS[date.getMonth()]!;
      case "b":
        return MONTHS[date.getMonth()]!.slice(0, 3);
      case "d":
        return pad(date.getDate());
      case "A":
        return DAYS[date.getDay()]!;
      case "a":
        return DAYS[date.getDay()]!.slice(0, 3);
      case "H":
        return pad(hours);
      case "I":
        return pad(hours % 12 || 12);
      case "M":
        return pad(date.getMinutes());
      case "S":
        return pad(date.getSeconds());
      case "p":
        return hours < 12 ? "AM" : "PM";
      case "%":
        return "%";
      default:
        return found;
    }
  });
}
