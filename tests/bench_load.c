/* The load client of bench.py: opens many WebSocket connections, answers pings and counts messages.

   It hops from frame header to frame header and looks at no payload, so that it is never what is measured.
   Commands come on stdin, one a line; times are nanoseconds of CLOCK_MONOTONIC.

     connect PORT CLIENTS INFLIGHT OFFER PATH -> OPENED FAILED START END AGREED
                                                               PATH @FILE: each client takes the next line's
     expect MESSAGES EVERY CHECK FILE         -> STRAY         messages that nobody expected until now
                            and later         -> COMPLETE OPEN ALIKE BYTES
                                                               every client has its messages or is gone
     stop                                     ends an "expect" that waits in vain

   Who connects after "expect" is expected to get as much as the others; the result then follows that of "connect".
   With OFFER=1 clients offer permessage-deflate (RFC 7692) in the words of a browser; AGREED counts those whom
   the server let have it. BYTES are what all clients got since "expect": data frames with their headers.
   FILE then holds one int64 per client, the time of its last message; with EVERY=N one for each message of every
   Nth client (0: never came). With CHECK FILE.stream holds what the first client got, one message a line; with
   CHECK=2 every payload byte is hashed, too, and ALIKE tells whether all clients got the same.

   The process sleeps until something comes. Waking it costs the sender, alike on every side; but were it to spin, it
   would take one core of two away from sides with more than one thread or process. */
#define _GNU_SOURCE
#include "bench.h"
#include <arpa/inet.h>
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define DEFLATE "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"

enum state { CONNECTING, SHAKING, OPEN, GONE };

struct client {
    int fd;
    enum state state;
    int agreed; /* on permessage-deflate */
    unsigned char head[10]; /* the frame header, as far as it has come */
    int head_have, control_have;
    unsigned char control[125]; /* payload of a ping */
    uint64_t payload_left;
    uint64_t messages, hash;
};

static struct client *clients;
static int client_count, to_open, in_flight, in_flight_limit, opened, failed, offer, agreed, port, epoll_fd;
static int64_t connect_start;
static char path[512], result_file[512];
static FILE *paths;
static int expecting, every, check, incomplete, due; /* due: the result, once all are connected */
static uint64_t expected, stray, bytes;
static int64_t *times;
static FILE *stream;
static unsigned char buffer[1 << 18];

/* ---- results ---- */

static size_t slots(int count) {
    return every ? count / every * expected : (size_t)count;
}

static void report(void) {
    due = connect_start != 0;
    if (due) return;
    int complete = 0, open = 0, alike = 1;
    for (int i = 0; i < client_count; i++) {
        complete += clients[i].messages >= expected;
        open += clients[i].state == OPEN;
        alike &= clients[i].hash == clients[0].hash;
    }
    FILE *file = fopen(result_file, "wb");
    size_t count = slots(client_count);
    if (!file || fwrite(times, sizeof *times, count, file) != count || fclose(file)) die(result_file);
    if (stream) fclose(stream);
    free(times);
    stream = NULL;
    times = NULL;
    expecting = 0;
    printf("%d %d %d %llu\n", complete, open, alike, (unsigned long long)bytes);
}

static void expect(void) {
    char name[520];
    for (int i = 0; i < client_count; i++) clients[i].messages = clients[i].hash = 0;
    incomplete = 0;
    for (int i = 0; i < client_count; i++) incomplete += clients[i].state == OPEN;
    times = calloc(slots(client_count) + 1, sizeof *times);
    snprintf(name, sizeof name, "%s.stream", result_file);
    if (check && !(stream = fopen(name, "wb"))) die(name);
    expecting = 1;
    printf("%llu\n", (unsigned long long)stray);
    stray = bytes = 0;
}

/* ---- one client ---- */

static void gone(struct client *c) {
    enum state before = c->state;
    close(c->fd);
    c->state = GONE;
    if (before < OPEN) failed++, in_flight--;
    if (expecting && before != GONE && c->messages < expected && --incomplete == 0) report();
}

static void answer_ping(struct client *c) {
    /* A mask of four zero bytes changes nothing. */
    unsigned char pong[6 + 125] = {0x8A, 0x80 | c->control_have};
    memcpy(pong + 6, c->control, c->control_have);
    send(c->fd, pong, 6 + c->control_have, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void take_payload(struct client *c, const unsigned char *data, size_t size) {
    if (c->head[0] & 0x08) {
        if (c->control_have + size <= sizeof c->control) {
            memcpy(c->control + c->control_have, data, size);
            c->control_have += size;
        }
        return;
    }
    if (!check || !expecting) return;
    for (size_t i = 0; check == 2 && i < size; i++) c->hash = (c->hash ^ data[i]) * 1099511628211ULL; /* FNV-1a */
    if (c == clients) fwrite(data, 1, size, stream);
}

static void end_frame(struct client *c, int64_t now) {
    int opcode = c->head[0] & 0x0F, final = c->head[0] & 0x80;
    c->head_have = 0;
    if (opcode == 9) answer_ping(c);
    if (opcode == 8) gone(c);
    c->control_have = 0;
    if (opcode >= 8 || !final) return;
    if (!expecting) {
        stray++;
        return;
    }
    if (check && c == clients) fputc('\n', stream);
    size_t i = c - clients;
    if (every && (i + 1) % every == 0 && c->messages < expected) times[i / every * expected + c->messages] = now;
    if (++c->messages > expected) stray++;
    if (c->messages != expected) return;
    if (!every) times[i] = now;
    if (--incomplete == 0) report();
}

static void begin_frame(struct client *c) {
    int opcode = c->head[0] & 0x0F, reserved = c->head[0] & 0x70;
    int rsv1 = c->agreed && (opcode == 1 || opcode == 2) ? 0x40 : 0; /* RFC 7692, section 6.1 */
    if (reserved & ~rsv1) gone(c);
    if (opcode < 8) bytes += c->head_have + c->payload_left;
}

static void take(struct client *c, const unsigned char *data, size_t size, int64_t now) {
    while (size > 0 && c->state == OPEN) {
        if (c->payload_left == 0) {
            c->head[c->head_have++] = *data++, size--;
            int length = c->head[1] & 0x7F;
            int more = c->head_have < 2 ? 0 : length == 127 ? 8 : length == 126 ? 2 : 0;
            if (c->head_have < 2 + more) continue;
            c->payload_left = more ? 0 : length;
            for (int i = 0; i < more; i++) c->payload_left = c->payload_left << 8 | c->head[2 + i];
            begin_frame(c);
            if (c->state == GONE) return;
        }
        size_t part = size < c->payload_left ? size : c->payload_left;
        take_payload(c, data, part);
        data += part, size -= part, c->payload_left -= part;
        if (c->payload_left == 0) end_frame(c, now);
    }
}

static void shake_hands(struct client *c) {
    /* Look first and take only the response: a message may stand right behind it. */
    ssize_t size = recv(c->fd, buffer, 4096, MSG_PEEK | MSG_DONTWAIT);
    if (size < 0 && errno == EAGAIN) return;
    unsigned char *end = size > 0 ? memmem(buffer, size, "\r\n\r\n", 4) : NULL;
    if (!end && size > 0 && size < 4096) return;
    if (!end || memcmp(buffer, "HTTP/1.1 101", 12)) {
        gone(c);
        return;
    }
    if (recv(c->fd, buffer, end + 4 - buffer, MSG_DONTWAIT) < 0) die("recv");
    c->state = OPEN;
    c->agreed = memmem(buffer, end - buffer, "permessage-deflate", 18) != NULL;
    agreed += c->agreed;
    opened++, in_flight--;
}

static void ask(struct client *c) {
    char request[1024];
    if (paths && !fgets(path, sizeof path, paths)) die("too few paths");
    path[strcspn(path, "\n")] = 0;
    int size = snprintf(request, sizeof request,
                        "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
                        "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n%s\r\n",
                        path, port, offer ? DEFLATE : "");
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = c - clients};
    if (send(c->fd, request, size, MSG_NOSIGNAL) != size) {
        gone(c);
        return;
    }
    c->state = SHAKING;
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
}

static void on_ready(struct client *c) {
    if (c->state == CONNECTING) ask(c);
    else if (c->state == SHAKING) shake_hands(c);
    else if (c->state == OPEN) {
        ssize_t size = recv(c->fd, buffer, sizeof buffer, MSG_DONTWAIT);
        if (size > 0) take(c, buffer, size, now_ns());
        else if (size == 0 || errno != EAGAIN) gone(c);
    }
}

static void open_more(void) {
    struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(port)};
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    while (to_open > 0 && in_flight < in_flight_limit) {
        struct client *c = &clients[client_count];
        struct epoll_event event = {.events = EPOLLOUT, .data.u32 = client_count};
        *c = (struct client){.fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)};
        if (c->fd < 0) die("socket");
        if (connect(c->fd, (struct sockaddr *)&server, sizeof server) && errno != EINPROGRESS) die("connect");
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event);
        client_count++, to_open--, in_flight++;
    }
}

/* ---- commands ---- */

static void make_room(int more) {
    size_t had = slots(client_count), has = slots(client_count + more);
    times = realloc(times, (has + 1) * sizeof *times);
    memset(times + had, 0, (has - had) * sizeof *times);
    incomplete += more;
}

static void command(void) {
    char line[1024];
    int more = 0;
    if (!fgets(line, sizeof line, stdin)) exit(0);
    if (sscanf(line, "connect %d %d %d %d %511s", &port, &more, &in_flight_limit, &offer, path) == 5) {
        clients = realloc(clients, (client_count + more) * sizeof *clients);
        to_open = more, opened = failed = agreed = 0, connect_start = now_ns();
        if (paths) fclose(paths);
        paths = path[0] == '@' ? fopen(path + 1, "r") : NULL;
        if (path[0] == '@' && !paths) die(path + 1);
        if (expecting) make_room(more);
    } else if (sscanf(line, "expect %lu %d %d %511[^\n]", &expected, &every, &check, result_file) == 4) {
        expect();
    } else if (expecting) {
        report();
    }
}

int main(void) {
    struct epoll_event events[512], on_stdin = {.events = EPOLLIN, .data.u32 = UINT32_MAX};
    setvbuf(stdin, NULL, _IONBF, 0); /* else a line could hide from epoll in stdio's buffer */
    setvbuf(stdout, NULL, _IOLBF, 0);
    epoll_fd = epoll_create1(0);
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, 0, &on_stdin);
    for (;;) {
        int count = epoll_wait(epoll_fd, events, 512, -1);
        for (int i = 0; i < count; i++) {
            if (events[i].data.u32 == UINT32_MAX) command();
            else on_ready(&clients[events[i].data.u32]);
        }
        if (!connect_start) continue;
        open_more();
        if (to_open || in_flight) continue;
        printf("%d %d %lld %lld %d\n", opened, failed, (long long)connect_start, (long long)now_ns(), agreed);
        connect_start = 0;
        if (due) report();
    }
}
