// CLIP's tokenizer: text to the numbers that a text encoder takes. tests/test_live.py holds it to transformers'.

/** What byte-level BPE writes for each of the 256 bytes: itself where it prints, else a letter from 256 up. */
function byteLetters() {
  const letters = [];
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    const prints = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    letters.push(String.fromCodePoint(prints ? byte : next++));
  }
  return letters;
}

/**
 * vocabulary: token -> number; merges: text of merges.txt, the most frequent pair first; tokens: length, start, end,
 * pad and unknown, as model.json has them.
 * Returns: text -> {ids, cut}: `length` numbers, and how many more the text would have needed.
 */
export function makeTokenizer(vocabulary, merges, tokens) {
  const ranks = new Map(merges.split("\n").filter(line => line && !line.startsWith("#version")).map((line, i) => [line, i]));
  const letters = byteLetters(), utf8 = new TextEncoder();
  const special = [tokens.start, tokens.end];
  const atSpecial = new RegExp(`(${special.map(each => each.replaceAll("|", "\\|")).join("|")})`);
  const pieces = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu;
  const number = token => vocabulary[token] ?? vocabulary[tokens.unknown];

  /** Letters of one piece, neighbors joined in the order of the ranks until none is known. */
  function joined(piece) {
    const parts = [...utf8.encode(piece)].map(byte => letters[byte]);
    parts[parts.length - 1] += "</w>";
    for (;;) {
      const found = parts.slice(1).map((part, i) => ranks.get(`${parts[i]} ${part}`) ?? Infinity);
      const best = Math.min(...found);
      if (best === Infinity) return parts;
      const at = found.indexOf(best);
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }

  return text => {
    const ids = text.split(atSpecial).flatMap(part => special.includes(part) ? [vocabulary[part]]
      : (part.normalize("NFC").toLowerCase().match(pieces) ?? []).flatMap(piece => joined(piece).map(number)));
    const room = tokens.length - 2, kept = ids.slice(0, room);
    const padding = Array(room - kept.length).fill(vocabulary[tokens.pad]);
    return {ids: [vocabulary[tokens.start], ...kept, vocabulary[tokens.end], ...padding], cut: Math.max(0, ids.length - room)};
  };
}
