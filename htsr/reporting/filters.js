// What the fields above the columns of a table hold: which values they let through. Knows no page.

// (value) => whether a number is let through; null for what is not understood.
//   > 6   <= 2   2 .. 4   2 ..   .. 4   3.9 (what rounds to it)   nothing (all, also where there is no number)
function numberFilter(wanted) {
  const words = wanted.replace(/\s+/g, "").replaceAll("−", "-").replace("≥", ">=").replace("≤", "<=");
  if (!words) return () => true;
  const one = "[-+]?(?:\\d+(?:\\.\\d+)?|\\.\\d+)(?:e[-+]?\\d+)?";
  const bound = words.match(new RegExp(`^(>=|<=|>|<)(${one})$`, "i"));
  const range = words.match(new RegExp(`^(${one})?\\.\\.(${one})?$`, "i"));
  const single = words.match(new RegExp(`^=?(${one})$`, "i"));
  if (bound) return ofNumbers(COMPARED[bound[1]], Number(bound[2]));
  if (range && (range[1] || range[2])) {
    const [low, high] = [Number(range[1] ?? -Infinity), Number(range[2] ?? Infinity)];
    return ofNumbers((value) => low <= value && value <= high);
  }
  if (single) return ofNumbers(roundsTo, single[1]);
  return null;
}

const COMPARED = {
  ">=": (value, limit) => value >= limit,
  "<=": (value, limit) => value <= limit,
  ">": (value, limit) => value > limit,
  "<": (value, limit) => value < limit,
};

const ofNumbers = (test, ...more) => (value) => typeof value === "number" && test(value, ...more);

// Whether a number is written so, with as many decimals.
function roundsTo(value, word) {
  const [, decimals, exponent] = word.toLowerCase().match(/^[^.e]*\.?(\d*)(?:e(.*))?$/);
  const half = 0.5 * 10 ** (Number(exponent ?? 0) - decimals.length);
  return Math.abs(value - Number(word)) <= half * (1 + 1e-9);
}

// (value) => whether a word holds what is wanted, in any case.
function wordFilter(wanted) {
  const part = wanted.trim().toLowerCase();
  return (value) => String(value ?? "").toLowerCase().includes(part);
}
