/* The floor of bench.py: the least that one thread can do, one `send` for each client and event.

   It answers every handshake alike, parses nothing, and has the frames ready before the clock starts.
   Commands come on stdin, one a line, as for the sides in Python; times are nanoseconds of CLOCK_MONOTONIC.

     pad COUNT SIZE FIRST -> made         that many numbered events of about SIZE bytes
     send                 -> START END    every event to every client */
#define _GNU_SOURCE
#include "bench.h"
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

struct frame {
    size_t size;
    unsigned char *bytes;
};

static int listener, *clients, client_count, frame_count;
static struct frame *frames;

static int listen_anywhere(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096)) die("listen");
    getsockname(listener, (struct sockaddr *)&address, &size);
    return ntohs(address.sin_port);
}

static void welcome(void) {
    static const char answer[] = "HTTP/1.1 101 Switching Protocols\r\n\r\n";
    char request[4096]; /* the load client sends its request in one piece */
    int client = accept(listener, NULL, NULL), on = 1;
    if (client < 0) die("accept");
    setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (recv(client, request, sizeof request, 0) <= 0) die("recv");
    if (send(client, answer, sizeof answer - 1, MSG_NOSIGNAL) < 0) die("send");
    clients = realloc(clients, (client_count + 1) * sizeof *clients);
    clients[client_count++] = client;
}

static struct frame make_frame(int number, int size) {
    int pad = size > 70 ? size - 70 : 0;
    unsigned char *bytes = malloc(pad + 200);
    char *text = (char *)bytes + 4; /* behind a header for 126 to 65,535 bytes, RFC 6455, section 5.2 */
    int length = sprintf(text, "{\"event\":\"bench\",\"payload\":{\"n\":%d,\"pad\":\"", number);
    memset(text + length, 'x', pad);
    length += pad;
    length += sprintf(text + length, "\"},\"timestamp\":%lld}", (long long)time(NULL));
    if (length < 126 || length > 65535) exit(1);
    memcpy(bytes, (unsigned char[]){0x81, 126, length >> 8, length & 0xFF}, 4);
    return (struct frame){length + 4, bytes};
}

static void make_frames(int count, int size, int first) {
    for (int i = 0; i < frame_count; i++) free(frames[i].bytes);
    frames = realloc(frames, count * sizeof *frames);
    for (int i = 0; i < count; i++) frames[i] = make_frame(first + i, size);
    frame_count = count;
    puts("made");
}

static void broadcast(void) {
    long long start = now_ns();
    for (int i = 0; i < frame_count; i++)
        for (int c = 0; c < client_count; c++)
            if (send(clients[c], frames[i].bytes, frames[i].size, MSG_NOSIGNAL) != (ssize_t)frames[i].size) die("send");
    printf("%lld %lld\n", start, now_ns());
}

static void command(void) {
    char line[100];
    int count, size, first;
    if (!fgets(line, sizeof line, stdin)) exit(0);
    if (sscanf(line, "pad %d %d %d", &count, &size, &first) == 3) make_frames(count, size, first);
    else broadcast();
}

int main(void) {
    setvbuf(stdin, NULL, _IONBF, 0); /* else a line could hide from poll in stdio's buffer */
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("listening on ws://127.0.0.1:%d\n", listen_anywhere());
    struct pollfd ready[] = {{.fd = 0, .events = POLLIN}, {.fd = listener, .events = POLLIN}};
    for (;;) {
        poll(ready, 2, -1);
        if (ready[1].revents) welcome();
        if (ready[0].revents) command();
    }
}
