// Requests to the service; docs/serving.md describes them. All errors that it throws are of ServerError, in words.

export class ServerError extends Error {
  /**
   * @param {string} code one word, as in the service's error replies.
   * @param {string} message what to show.
   * @param {number} [retryAfter] seconds after which the same request may succeed.
   */
  constructor(code, message, retryAfter) {
    super(message);
    Object.assign(this, { code, retryAfter });
  }
}

let token = sessionStorage.getItem("flashcocos-token");

/** Send `text` as the token of all requests from now on, until the tab is closed. */
export function setToken(text) {
  token = text;
  sessionStorage.setItem("flashcocos-token", text);
}

async function call(path, options = {}) {
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("no_answer", "The service does not answer. Is it still running?", 3);
  }
  if (response.ok) return response;
  const reply = await response.json().catch(() => ({}));
  const { code = "unknown", message = `the service answered with status ${response.status}` } = reply.error ?? {};
  throw new ServerError(code, message, Number(response.headers.get("retry-after")) || undefined);
}

async function bytesOf(path, signal) {
  return new Uint8Array(await (await call(path, { signal })).arrayBuffer());
}

export const getModel = async () => (await call("v1/model")).json();
export const getLabel = (id) => bytesOf(`v1/labels/${id}`);
export const getExemplarLabel = (id) => bytesOf(`v1/exemplars/${id}/label`);
export const getExemplarImage = async (id, signal) => (await call(`v1/exemplars/${id}/image`, { signal })).blob();

export async function putLabel(body, signal) {
  return (await call("v1/labels", { method: "PUT", body, signal })).json();
}

export async function putExemplar(body, label, size, signal) {
  const query = new URLSearchParams(label ? { label, size } : { size });
  return (await call(`v1/exemplars?${query}`, { method: "PUT", body, signal })).json();
}

/** A translation with all that hovering needs: pictures as blobs, confidence and matches as bytes. */
export async function translate(exemplar, size, body, signal) {
  const path = `v1/exemplars/${exemplar}/translate?${new URLSearchParams({ size, want: "all" })}`;
  const reply = await (await call(path, { method: "POST", body, signal })).json();
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const picture = (text) => new Blob([bytes(text)], { type: "image/png" });
  return {
    ...reply,
    image: picture(reply.image),
    warped: picture(reply.warped),
    confidence: bytes(reply.confidence),
    matches: bytes(reply.matches),
  };
}

/** Runs the newest of many asked jobs: one at a time, and a newer one aborts the one before. */
export class Latest {
  #timer;
  #controller = new AbortController();
  #running = Promise.resolve();

  /** @param {(signal: AbortSignal) => Promise<void>} work the job; it reports its own errors. */
  constructor(work) {
    this.work = work;
  }

  /** Run the job once nobody has asked for `delay` milliseconds. */
  ask(delay) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#run(), delay);
  }

  async #run() {
    this.#controller.abort();
    const { signal } = (this.#controller = new AbortController());
    const before = this.#running;
    this.#running = before.then(() => (signal.aborted ? undefined : this.work(signal)));
  }
}
