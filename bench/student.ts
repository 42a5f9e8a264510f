/** The 97.5% quantile of Student's distribution, for a whole number of degrees of freedom. */
export function student(freedom: number): number {
  let low = 0, high = 100;
  for (let step = 0; step < 60; step++) {
    const middle = (low + high) / 2;
    if (within(middle, freedom) < 0.95) low = middle;
    else high = middle;
  }
  return high;
}

/** How likely it lies between -t and t: Abramowitz and Stegun, 26.7.3 and 26.7.4. */
function within(t: number, freedom: number): number {
  const angle = Math.atan(t / Math.sqrt(freedom));
  const odd = freedom % 2 === 1;
  const cos = Math.cos(angle);
  let sum = 0;
  for (let n = odd ? 1 : 0, term = odd ? cos : 1; n <= freedom - 2; n += 2) {
    sum += term;
    term *= cos * cos * (n + 1) / (n + 2);
  }
  sum *= Math.sin(angle);
  return odd ? 2 / Math.PI * (angle + sum) : sum;
}
