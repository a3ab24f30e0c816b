// The tab's entry: TensorBoard calls `render` in a frame of the page's own.
import { Page } from "./page.js";

async function json(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path.split("?")[0]}: ${answer.status} ${(await answer.text()).slice(0, 300)}`);
  return answer.json();
}

const server = {
  async runs() {
    return (await json("./runs")).runs;
  },
  findings(run) {
    return json(`./findings?run=${encodeURIComponent(run)}`);
  },
  async matrix(run, columns, low, high) {
    const zoom = low === null ? "" : `&low=${low}&high=${high}`;
    const answer = await fetch(`./matrix?run=${encodeURIComponent(run)}&columns=${columns}${zoom}`);
    if (!answer.ok) throw new Error(`matrix: ${answer.status}`);
    return answer.arrayBuffer();
  },
};

/** TensorBoard tells of reloads over a channel of messages, as text that wants an answer. */
function onReload(act) {
  const channel = new MessageChannel();
  window.parent.postMessage("experimental.bootstrap", "*", [channel.port2]);
  channel.port1.onmessage = (event) => {
    const message = JSON.parse(event.data);
    if (message.isReply) return;
    channel.port1.postMessage(
      JSON.stringify({ type: message.type, id: message.id, payload: null, error: null, isReply: true }),
    );
    if (message.type === "experimental.DataReloaded") act();
  };
}

function parentBody() {
  try {
    return window.parent.document.body;
  } catch {
    return document.body;
  }
}

/** The address of the page around us keeps the view, so that it can be shared. */
const address = {
  read() {
    try {
      return new URLSearchParams(window.parent.location.hash.replace(/^#[^&]*&?/, ""));
    } catch {
      return new URLSearchParams();
    }
  },
  write(parameters) {
    try {
      window.parent.history.replaceState(null, "", `#gradwatch&${parameters}`);
    } catch {
      // A frame without access to its parent: the view is not shared, and all else works.
    }
  },
};

export async function render() {
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = "./static/page.css";
  document.head.append(style);
  const body = parentBody();
  const isDark = () => body.classList.contains("dark-mode");
  const page = new Page(document.body, server, address, isDark);
  new MutationObserver(() => page.redraw()).observe(body, { attributes: true, attributeFilter: ["class"] });
  onReload(() => page.load());
  await page.load();
}
