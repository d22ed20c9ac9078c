"use strict";
// Which words of two texts differ, by the longest common subsequence of their words.
// Gives [[kept, words], ...] of each text, or null where little is common: a wholly other answer is easier to read without marks.
const wordDiff = (before, after) => {
  const split = (text) => text.match(/\s+|[^\s]+/g) || [];
  const left = split(before), right = split(after);
  let start = 0;
  while (start < left.length && start < right.length && left[start] === right[start]) start++;
  let end = 0;
  while (end < left.length - start && end < right.length - start && left[left.length - 1 - end] === right[right.length - 1 - end]) end++;
  const a = left.slice(start, left.length - end), b = right.slice(start, right.length - end);
  if (a.length * b.length > 4_000_000) return null;
  const wide = b.length + 1;
  const longest = new Uint16Array((a.length + 1) * wide);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      longest[i * wide + j] = a[i] === b[j] ? longest[(i + 1) * wide + j + 1] + 1 : Math.max(longest[(i + 1) * wide + j], longest[i * wide + j + 1]);
    }
  }
  const keptA = new Set(), keptB = new Set();
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) { keptA.add(start + i++); keptB.add(start + j++); }
    else if (longest[(i + 1) * wide + j] >= longest[i * wide + j + 1]) i++;
    else j++;
  }
  const words = (tokens, kept) => tokens.filter((token, at) => token.trim() && (at < start || at >= tokens.length - end || kept.has(at))).length;
  const common = words(left, keptA), most = Math.max(left.length, right.length) / 2;
  if (common < 0.3 * most) return null;
  const runs = (tokens, kept) => {
    const made = [];
    tokens.forEach((token, at) => {
      const same = at < start || at >= tokens.length - end || kept.has(at);
      if (made.length && made[made.length - 1][0] === same) made[made.length - 1][1] += token;
      else made.push([same, token]);
    });
    return made;
  };
  return [runs(left, keptA), runs(right, keptB)];
};
