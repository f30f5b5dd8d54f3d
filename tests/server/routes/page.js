// A document just large enough for the page of /docs: run its script on a JSON file, then print what it made, as JSON.
"use strict";
const fs = require("node:fs");
const vm = require("node:vm");

class Element {
  constructor(tag) {
    Object.assign(this, { tag, attributes: {}, children: [] });
  }
  setAttribute(name, value) {
    this.attributes[name] = String(value);
  }
  append(...children) {
    this.children.push(...children);
  }
}

const [page, api] = process.argv.slice(2).map((path) => fs.readFileSync(path, "utf8"));
const body = new Element("body");
const context = vm.createContext({
  document: { body, createElement: (tag) => new Element(tag) },
  location: { hash: "" },
  fetch: async (path) => ({ ok: path === "openapi.json", status: 404, json: async () => JSON.parse(api) }),
});
vm.runInContext(/<script>(.*?)<\/script>/s.exec(page)[1], context);
setImmediate(() => console.log(JSON.stringify({ title: context.document.title, body })));
