<?php
/*
 * A PHP page that tells every connected browser what was sent to it; nothing is installed for that.
 *
 *     WS_QUEUE_PATH=/tmp/ws_queue python3 wsqueue.py serve                                  in one terminal
 *     WS_QUEUE_PATH=/tmp/ws_queue php -S 127.0.0.1:8080 examples/publish.php                in another
 *
 * Then open http://127.0.0.1:8080/ in a browser.
 *
 * The server makes the directory; the user that PHP runs as must be allowed to write to it.
 * It runs on PHP 7.4 and later. Environment: WS_QUEUE_PATH, and WS_PORT, of the server, for the page.
 */

/** Queue an event: whole or not at all. False if it was not queued; then the error log says why. */
function queue_event(string $queue, string $event, $payload = null): bool
{
    $json = json_encode(['event' => $event, 'payload' => $payload]); // false for what is not UTF-8
    $name = time() . '_' . uniqid('', true) . '.json'; // uniqid() begins with the microsecond, which is the order
    $temporary = "$queue/.$name.tmp";
    $queued = $json !== false && @file_put_contents($temporary, $json) === strlen($json)
        && @rename($temporary, "$queue/$name");
    if (!$queued) {
        error_log("not queued in $queue: " . ($json ? error_get_last()['message'] ?? '' : json_last_error_msg()));
        @unlink($temporary); // half of it, on a full disk
    }
    return $queued;
}

function answer(int $status, array $body): void
{
    http_response_code($status);
    header('Content-Type: application/json');
    exit(json_encode($body));
}

/** Whether a browser sent this from a page of another site, which may not speak for its visitor. */
function comes_from_elsewhere(): bool
{
    $origin = $_SERVER['HTTP_ORIGIN'] ?? null;
    return $origin !== null && preg_replace('#^https?://#', '', $origin) !== ($_SERVER['HTTP_HOST'] ?? '');
}

header('X-Content-Type-Options: nosniff');
header('Cache-Control: no-store');
if ($_SERVER['REQUEST_METHOD'] === 'POST') {
    $text = $_POST['text'] ?? null;
    if (comes_from_elsewhere()) {
        answer(403, ['error' => 'Send it from a page of this site.']);
    }
    if (!is_string($text) || !preg_match('/^.{1,1000}$/su', $text)) {
        answer(400, ['error' => 'Send a form with a text of 1 to 1000 characters in UTF-8.']);
    }
    if (!queue_event(getenv('WS_QUEUE_PATH') ?: __DIR__ . '/logs/ws_queue', 'note', ['text' => $text])) {
        answer(503, ['error' => 'The note could not be queued; the error log says why.']);
    }
    answer(202, ['queued' => true]);
}
if (!in_array($_SERVER['REQUEST_METHOD'], ['GET', 'HEAD'], true)) {
    header('Allow: GET, HEAD, POST');
    answer(405, ['error' => 'Use GET or POST.']);
}
header('Content-Type: text/html; charset=utf-8');
?>
<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Notes</title>
<form id="send">
  <label>Note <input name="text" maxlength="1000" required></label> <button>Send</button> <output id="answer"></output>
</form>
<ul id="notes"></ul>
<script>
const socket = new WebSocket(`ws://${location.hostname}:<?= (int) (getenv('WS_PORT') ?: 8081) ?>/`);
socket.onmessage = ({ data }) => {
  const { event, payload } = JSON.parse(data);
  if (event !== "note") return;
  const item = document.createElement("li");
  item.textContent = payload.text;  // as text, never as HTML: anyone may have written it
  document.getElementById("notes").prepend(item);
};
document.getElementById("send").onsubmit = async event => {
  event.preventDefault();
  const response = await fetch(location, { method: "POST", body: new FormData(event.target) });
  document.getElementById("answer").textContent = response.ok ? "sent" : (await response.json()).error;
};
</script>
</html>
