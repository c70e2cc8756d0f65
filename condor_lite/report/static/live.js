// Keeps a page alive: the connection to /events, times in the reader's zone, and parts that are fetched anew.
//
// - <time datetime=ISO data-show="stamp|clock|age|countdown|now">
// - an element with an id and data-live="leaderboard prices": its content is fetched anew on these events;
//   then "condor:swapped" is dispatched on document, with the ids in detail
// - [data-price-of="BTC"]: gets the newest price; [data-price-time-of="BTC"]: a <time>, gets its time
// - every event of the stream is dispatched on document as "condor:<event>" with its data in detail
"use strict";

(() => {
  const EVENTS = [
    "prices", "round_opened", "round_closed", "round_scored", "leaderboard", "model_joined", "model_left",
    "service_restarted", "reset",
  ];
  const BETWEEN_MS = 2000; // a page is remembered that long by the server
  const AGAIN_MS = 10000;
  const root = document.documentElement;

  // The game's time, which may run faster than the wall's.

  let origin;
  const setClock = (iso, speed) => {
    origin = { game: Date.parse(iso), wall: Date.now(), speed: Number(speed) };
  };
  const now = () => origin.game + (Date.now() - origin.wall) * origin.speed;
  setClock(root.dataset.now, root.dataset.speed);

  // Times

  const clock = { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" };
  const formats = {
    stamp: new Intl.DateTimeFormat(undefined, { year: "numeric", month: "short", day: "numeric", ...clock }),
    clock: new Intl.DateTimeFormat(undefined, clock),
    otherDay: new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", ...clock }),
  };
  const span = (ms) => {
    const s = Math.max(ms / 1000, 0);
    if (s < 120) return `${Math.round(s)} s`;
    if (s < 7200) return `${Math.round(s / 60)} min`;
    if (s < 172800) return `${Math.round(s / 3600)} h`;
    return `${Math.round(s / 86400)} d`;
  };
  const sayTime = (element) => {
    const show = element.dataset.show;
    if (show === "now") element.dateTime = new Date(Math.floor(now() / 1000) * 1000).toISOString();
    const at = Date.parse(element.dateTime);
    if (Number.isNaN(at)) return;
    let text;
    if (show === "age") text = `${span(now() - at)} ago`;
    else if (show === "countdown") text = at > now() ? `in ${span(at - now())}` : "now";
    else if (show === "clock") {
      const sameDay = new Date(at).toDateString() === new Date(now()).toDateString();
      text = (sameDay ? formats.clock : formats.otherDay).format(at);
    } else text = formats.stamp.format(at);
    if (element.textContent !== text) element.textContent = text;
    element.title = `${new Date(at).toISOString().slice(0, 19).replace("T", " ")} UTC`;
  };
  const sayTimes = (within) => within.querySelectorAll("time[data-show]").forEach(sayTime);
  const sayMoving = () => {
    document.querySelectorAll("time:is([data-show=age], [data-show=countdown], [data-show=now])").forEach(sayTime);
  };

  // Parts of the page, fetched anew

  const waiting = new Set();
  const shown = new Map();
  let fetched = Date.now();
  let timer = null;
  let fetching = false;

  const refresh = (...events) => {
    events.forEach((event) => waiting.add(event));
    if (timer === null && !fetching && !document.hidden) {
      timer = setTimeout(fetchParts, Math.max(fetched + BETWEEN_MS - Date.now(), 50));
    }
  };
  const wanted = () => [...document.querySelectorAll("[data-live]")].filter((element) => {
    return waiting.has("reset") || element.dataset.live.split(" ").some((event) => waiting.has(event));
  });

  const ownAddress = () => {
    const address = new URL(location.href);
    // What is not searched for is hidden here, not left out there.
    if (document.querySelector("form[data-search]")) address.searchParams.delete("q");
    return address.href;
  };

  async function fetchParts() {
    timer = null;
    const elements = wanted();
    const events = [...waiting];
    waiting.clear();
    if (!elements.length) return;
    fetching = true;
    let again = true;
    try {
      const address = ownAddress();
      const answer = await fetch(address, { headers: { Accept: "text/html" }, cache: "no-cache" });
      const html = await answer.text();
      again = answer.status === 503 || address !== ownAddress(); // the server is busy; sorted otherwise meanwhile
      if (again || !answer.ok) return;
      const page = new DOMParser().parseFromString(html, "text/html");
      setClock(page.documentElement.dataset.now, page.documentElement.dataset.speed);
      const swapped = elements.filter((element) => swap(element, page.getElementById(element.id)));
      if (swapped.length) {
        const detail = swapped.map((element) => element.id);
        document.dispatchEvent(new CustomEvent("condor:swapped", { detail }));
      }
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // the network: the connection's state says so
    } finally {
      fetching = false;
      fetched = Date.now();
      if (again && !lost) events.forEach((event) => waiting.add(event));
      if (waiting.size) refresh();
    }
  }

  function swap(element, fresh) {
    if (!fresh || shown.get(element.id) === fresh.innerHTML) return false;
    shown.set(element.id, fresh.innerHTML);
    const focused = element.contains(document.activeElement) ? document.activeElement : null;
    const href = focused && focused.getAttribute("href");
    element.replaceChildren(...fresh.childNodes);
    if (!fresh.dataset.live) delete element.dataset.live; // its parts are alive themselves from now on
    sayTimes(element);
    if (focused) {
      const again = [...element.querySelectorAll("a")].find((link) => link.getAttribute("href") === href);
      if (again) again.focus({ preventScroll: true });
    }
    return true;
  }

  // Prices, right where they are

  const sayPrice = ({ asset, price, ts }) => {
    const decimals = Math.max(2, 6 - String(Math.trunc(Math.abs(price))).length);
    const text = price.toLocaleString("en-US", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
    for (const element of document.querySelectorAll("[data-price-of]")) {
      if (element.dataset.priceOf === asset) element.textContent = text;
    }
    for (const element of document.querySelectorAll("time[data-price-time-of]")) {
      if (element.dataset.priceTimeOf === asset) {
        element.dateTime = ts;
        sayTime(element);
      }
    }
  };
  document.addEventListener("condor:prices", ({ detail }) => {
    setClock(detail.now, origin.speed);
    detail.assets.forEach(sayPrice);
  });

  // The connection

  const state = document.getElementById("connection");
  let source = null;
  let lost = false;
  let newest = root.dataset.since; // what came after it, while the page was on its way, comes first

  const say = (live) => {
    const text = live ? "live" : "reconnecting …";
    if (state.textContent !== text) state.textContent = text;
    state.dataset.state = live ? "live" : "lost";
    state.hidden = false;
  };

  function connect() {
    if (source) source.close();
    source = new EventSource(`${root.dataset.root}/events?after=${encodeURIComponent(newest)}`);
    source.addEventListener("open", () => {
      say(true);
      if (lost) refresh("reset");
      lost = false;
    });
    source.addEventListener("error", () => {
      lost = true;
      say(false);
      if (source.readyState === EventSource.CLOSED) setTimeout(connect, AGAIN_MS);
    });
    for (const name of EVENTS) {
      source.addEventListener(name, (event) => {
        newest = event.lastEventId;
        document.dispatchEvent(new CustomEvent(`condor:${name}`, { detail: JSON.parse(event.data) }));
        refresh(name);
      });
    }
  }

  window.addEventListener("offline", () => {
    lost = true;
    say(false);
  });
  window.addEventListener("online", connect);
  window.addEventListener("pagehide", () => source && source.close());
  window.addEventListener("pageshow", (event) => event.persisted && connect());
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && waiting.size) refresh();
  });

  window.condor = { now, refresh, span };
  sayTimes(document);
  setInterval(sayMoving, 1000);
  connect();
})();
