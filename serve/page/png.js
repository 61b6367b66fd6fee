// PNG files written and read in plain arithmetic. Browsers that resist fingerprinting alter what a canvas gives back,
// so class ids never pass through one.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, value) => {
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value;
});

/**
 * Write class ids as an 8-bit PNG.
 * @param {{width: number, height: number, ids: Uint8Array}} label
 * @param {number[][]} [palette] colors (red, green, blue) by id; with them the file is a palette PNG, else a gray one.
 * @returns {Promise<Blob>}
 */
export async function encode({ width, height, ids }, palette) {
  const header = new Uint8Array(13);
  const view = new DataView(header.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  header.set([8, palette ? 3 : 0], 8);
  const rows = new Uint8Array(height * (width + 1)); // each row begins with its filter: 0, none
  for (let y = 0; y < height; y++) rows.set(ids.subarray(y * width, (y + 1) * width), y * (width + 1) + 1);
  const colors = palette ? [chunk("PLTE", Uint8Array.from(palette.flat()))] : [];
  const data = await pipe(rows, new CompressionStream("deflate"));
  const parts = [Uint8Array.from(SIGNATURE), chunk("IHDR", header), ...colors, chunk("IDAT", data)];
  return new Blob([...parts, chunk("IEND", new Uint8Array())], { type: "image/png" });
}

/**
 * Read an 8-bit gray PNG, the form in which the service answers; it brings every other form into this one.
 * @param {Uint8Array} bytes
 * @returns {Promise<{width: number, height: number, ids: Uint8Array}>}
 */
export async function decode(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const width = view.getUint32(16);
  const height = view.getUint32(20);
  if (bytes[24] !== 8 || bytes[25] !== 0 || bytes[28] !== 0) throw new Error("the service sent no 8-bit gray PNG");
  const data = [];
  for (let at = 8; at < bytes.length; at += 12 + view.getUint32(at)) {
    const type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    if (type === "IDAT") data.push(bytes.subarray(at + 8, at + 8 + view.getUint32(at)));
  }
  const rows = await pipe(new Blob(data), new DecompressionStream("deflate"));
  return { width, height, ids: unfilter(rows, width, height) };
}

function unfilter(rows, width, height) {
  const ids = new Uint8Array(width * height);
  for (let y = 0, from = 0, to = 0; y < height; y++) {
    const filter = rows[from++];
    for (let x = 0; x < width; x++, to++) {
      const left = x ? ids[to - 1] : 0;
      const above = y ? ids[to - width] : 0;
      const corner = x && y ? ids[to - width - 1] : 0;
      ids[to] = rows[from++] + predict(filter, left, above, corner);
    }
  }
  return ids;
}

function predict(filter, left, above, corner) {
  if (filter === 4) {
    const [toLeft, toAbove, toCorner] = [above - corner, left - corner, left + above - 2 * corner].map(Math.abs);
    return toLeft <= toAbove && toLeft <= toCorner ? left : toAbove <= toCorner ? above : corner;
  }
  return [0, left, above, (left + above) >> 1][filter];
}

function chunk(type, data) {
  const bytes = new Uint8Array(12 + data.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set(new TextEncoder().encode(type), 4);
  bytes.set(data, 8);
  view.setUint32(8 + data.length, crc(bytes.subarray(4, 8 + data.length)));
  return bytes;
}

function crc(bytes) {
  let value = ~0;
  for (const byte of bytes) value = CRC_TABLE[(value ^ byte) & 255] ^ (value >>> 8);
  return ~value;
}

async function pipe(bytes, transform) {
  const stream = new Blob([bytes]).stream().pipeThrough(transform);
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
