/* Search for pages that are read from a folder.

   A browser starts no worker for a page without a server. There, and only there, the search script
   runs in a hidden frame instead, which looks like a worker from outside and from inside. */
"use strict";

if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<!doctype html>";
      const address = new URL(url, location.href).href;
      this.inside = new Promise((resolve) => {
        frame.addEventListener("load", async () => {
          const inside = frame.contentWindow;
          const run = (source) =>
            new Promise((done, failed) => {
              const script = inside.document.createElement("script");
              script.src = new URL(source, address).href;
              script.onload = done;
              script.onerror = failed;
              inside.document.head.append(script);
            });
          inside.importScripts = (...sources) =>
            sources.reduce((before, source) => before.then(() => run(source)), Promise.resolve());
          inside.postMessage = (data) =>
            this.dispatchEvent(new MessageEvent("message", { data }));
          await run(address);
          resolve(inside);
        });
      });
      document.body.append(frame);
    }

    postMessage(data) {
      this.inside.then((inside) =>
        inside.dispatchEvent(new inside.MessageEvent("message", { data })),
      );
    }
  };
}
