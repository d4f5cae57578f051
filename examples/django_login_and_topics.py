#!/usr/bin/env python3
"""A Django site in one file: the login decides who hears what, and a push server beside it tells them.

    pip install django
    (umask 077 && openssl rand -hex 32 > secret)
    python wsqueue.py serve --queue examples/logs/ws_queue --secret-file secret --allowed-origins http://127.0.0.1:8080
    WS_SECRET_FILE=secret python examples/django_login_and_topics.py         in another terminal

Then open http://127.0.0.1:8080/ as two users. The push server knows no users and no database: it believes the
ticket that a view has signed for whoever is logged in, with a topic for each of their groups. The two share the queue
directory and the secret. --allowed-origins are the pages that may connect, as the address bar has them: for a browser
localhost and 127.0.0.1 are two sites, and only pages of the push server's own host name need no mention.

Environment: WS_SECRET_FILE (or WS_SECRET), WS_QUEUE_PATH, PUSH_URL (ws://127.0.0.1:8081/), APP_HOST, APP_PORT (0 picks
a free one); APP_DIRECTORY keeps the database, SECRET_KEY signs the sessions, APP_PASSWORD is everybody's, and without
them, each start makes its own.
"""

import atexit
import os
import secrets
import shutil
import sys
import tempfile
from functools import wraps
from pathlib import Path
from typing import Any, Callable, Dict, List
from urllib.parse import urljoin

import django
from django.conf import settings
from django.core.servers.basehttp import ThreadedWSGIServer, WSGIRequestHandler
from django.core.wsgi import get_wsgi_application

# Run from a plain checkout, Python looks for modules beside this file; wsqueue.py is one directory up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wsqueue import WsqueueError, queue_event, sign_ticket

HERE = Path(__file__).resolve().parent
QUEUE = os.environ.get("WS_QUEUE_PATH") or str(HERE / "logs" / "ws_queue")
PUSH_URL = os.environ.get("PUSH_URL") or "ws://127.0.0.1:8081/"
HOST, PORT = os.environ.get("APP_HOST") or "127.0.0.1", os.environ.get("APP_PORT") or "8080"
PASSWORD = os.environ.get("APP_PASSWORD") or secrets.token_urlsafe(9)
USERS = {"ada": ["sales"], "grace": ["sales", "support"], "linus": ["support"]}  # and the groups of each
TEXT_LIMIT = 1000  # characters of a message

DIRECTORY = os.environ.get("APP_DIRECTORY")
if not DIRECTORY:
    DIRECTORY = tempfile.mkdtemp(prefix="wsqueue-django-")
    atexit.register(shutil.rmtree, DIRECTORY, ignore_errors=True)

BASE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Messages</title>
{% block page %}{% endblock %}
</html>
"""

LOGIN = """{% extends "base.html" %}{% block page %}
<form method="post">{% csrf_token %}
  {{ form.as_p }}
  <button>Log in</button>
</form>
{% endblock %}
"""

MESSAGES = """{% extends "base.html" %}{% block page %}
<form method="post" action="{% url 'logout' %}">{% csrf_token %}
  <output id="user">{{ user.username }}</output>, <output id="status">connecting</output> <button>Log out</button>
</form>
<form method="post" action="{% url 'messages' %}" id="send">{% csrf_token %}
  <p>To {% for topic, name in addressees %}
  <label><input type="checkbox" name="to" value="{{ topic }}"> {{ name }}</label>
  {% endfor %}</p>
  <label>Text <input name="text" maxlength="1000" required></label>
  <button>Send</button> <output id="answer"></output>
</form>
<ul id="messages"></ul>
{{ push_url|json_script:"push-url" }}
<script src="{{ script }}"></script>
<script>
const element = id => document.getElementById(id);
const queue = new WSQueue(JSON.parse(element("push-url").textContent), { ticket: async () => {
  const response = await fetch("{% url 'ticket' %}");
  if (response.status === 401) location.reload();  // the session is over: to the login
  if (!response.ok) throw new Error(`no ticket: ${response.status}`);
  return response.text();
} });

const known = new Map();  // by id: one that is both fetched and pushed is shown once
function show(messages) {
  for (const message of messages) known.set(message.id, message);
  element("messages").replaceChildren(...[...known.values()].sort((a, b) => b.id - a.id).map(message => {
    const item = document.createElement("li");
    item.textContent = `${message.from}: ${message.text}`;  // as text, never as HTML: anyone may have written it
    return item;
  }));
}
queue.on("message", message => show([message]));
queue.onstatus = async status => {
  element("status").textContent = status;
  // What there is already is fetched once the events come: the other way round, one could fall in between.
  if (status === "open") show((await (await fetch("{% url 'messages' %}")).json()).messages);
};
element("send").onsubmit = async event => {
  event.preventDefault();
  const body = new FormData(event.target);  // with the CSRF token of the form
  const response = await fetch(event.target.action, { method: "POST", body });
  element("answer").textContent = response.ok ? "sent" : `not sent: ${await response.text()}`;
};
</script>
{% endblock %}
"""

# A project has these in settings.py.
settings.configure(
    # Signs sessions and CSRF tokens. It is not WS_SECRET: the push server gets that one, and should be able to make
    # neither. A new key ends all sessions.
    SECRET_KEY=os.environ.get("SECRET_KEY") or secrets.token_hex(),
    DEBUG=False,  # its error pages show settings to everyone; without it, ALLOWED_HOSTS must be right
    ALLOWED_HOSTS=[HOST, "localhost", "127.0.0.1", "[::1]"],
    ROOT_URLCONF=__name__,
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions", __name__],
    MIDDLEWARE=[
        "django.middleware.security.SecurityMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.middleware.clickjacking.XFrameOptionsMiddleware",
    ],
    TEMPLATES=[{
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "OPTIONS": {
            "context_processors": ["django.contrib.auth.context_processors.auth"],
            "loaders": [("django.template.loaders.locmem.Loader",
                         {"base.html": BASE, "registration/login.html": LOGIN, "messages.html": MESSAGES})],
        },
    }],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": f"{DIRECTORY}/example.sqlite3"}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    USE_TZ=True,
    # Cookies know no ports: another Django on this host would take ours for its own, and we its.
    SESSION_COOKIE_NAME="example_session",
    CSRF_COOKIE_NAME="example_csrf",
    LOGIN_URL="login",
    LOGIN_REDIRECT_URL="page",
    LOGOUT_REDIRECT_URL="login",
    DATA_UPLOAD_MAX_MEMORY_SIZE=64 * 1024,
    # Files are not bounded by that, and nobody asked for one: what is larger is read and dropped.
    FILE_UPLOAD_MAX_MEMORY_SIZE=64 * 1024,
    FILE_UPLOAD_HANDLERS=["django.core.files.uploadhandler.MemoryFileUploadHandler"],
    # Without DEBUG, Django tells errors to ADMINS alone, of whom there are none.
    LOGGING={"version": 1, "disable_existing_loggers": False,
             "handlers": {"console": {"class": "logging.StreamHandler"}},
             "root": {"handlers": ["console"], "level": "WARNING"}},
)
django.setup()

# What follows has models, and those need the settings.
from django.contrib.auth.decorators import login_required
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import Group, User
from django.contrib.auth.views import LoginView, LogoutView
from django.core.management import call_command
from django.db import DatabaseError, connection, models, transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.urls import path
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET, require_http_methods


class Message(models.Model):
    """Was sent to a topic: to the members of a group ("group:sales"), or to one user ("user:2")."""

    topic = models.CharField(max_length=200, db_index=True)
    sender = models.ForeignKey(User, on_delete=models.CASCADE)
    text = models.CharField(max_length=TEXT_LIMIT)

    class Meta:
        db_table = "message"

    def payload(self) -> Dict[str, Any]:
        return {"id": self.pk, "from": self.sender.username, "text": self.text}


# ── Who hears what ───────────────────────────────────────────────────────────────────────────────────────


def for_scripts(view: Callable[[HttpRequest], HttpResponse]) -> Callable[[HttpRequest], HttpResponse]:
    """@login_required is not: they would follow its redirect, and take the login form for their answer."""

    @never_cache
    @wraps(view)
    def checked(request: HttpRequest) -> HttpResponse:
        return view(request) if request.user.is_authenticated else text_response("Log in first.", 401)

    return checked


@require_GET
@for_scripts
def ticket(request: HttpRequest) -> HttpResponse:
    """Lets its user connect to the push server within the next minute; the page fetches one each time.

    A connection outlives the ticket, a logout and a change of groups: it ends when its page goes.
    """
    # The user's own topic, "user:ID", comes with `user`. The session's cookie would be of no use to the push server,
    # though browsers send it to every port of this host: what it stands for is in our database.
    return text_response(sign_ticket(push_secret(), user=request.user.pk, topics=group_topics(request.user)))


def push_secret() -> str:
    file = os.environ.get("WS_SECRET_FILE")
    return Path(file).read_text("utf-8") if file else os.environ.get("WS_SECRET", "")


def group_topics(user: User) -> List[str]:
    return [f"group:{name}" for name in user.groups.values_list("name", flat=True)]


# ── The page, and what it sends and fetches ──────────────────────────────────────────────────────────────


@login_required
@never_cache
def page(request: HttpRequest) -> HttpResponse:
    script = urljoin(PUSH_URL.replace("ws", "http", 1), "/wsqueue.js")
    context = {"push_url": PUSH_URL, "script": script, "addressees": addressees(request.user).items()}
    return render(request, "messages.html", context)


def addressees(user: User) -> Dict[str, str]:
    """The topics that a user may send to, and how to call them: the own groups, and everybody."""
    everybody = User.objects.order_by("username").values_list("pk", "username")
    groups = {topic: topic.replace(":", " ", 1) for topic in group_topics(user)}
    return {**groups, **{f"user:{pk}": name for pk, name in everybody}}


@require_http_methods(["GET", "POST"])
@for_scripts
def messages(request: HttpRequest) -> HttpResponse:
    if request.method == "POST":
        return send(request)
    topics = [f"user:{request.user.pk}", *group_topics(request.user)]
    latest = Message.objects.filter(topic__in=topics).select_related("sender").order_by("-pk")[:50]
    return JsonResponse({"messages": [message.payload() for message in latest]})


def send(request: HttpRequest) -> HttpResponse:
    """Send to all topics that were chosen, or to none."""
    text, topics = request.POST.get("text", "").strip(), dict.fromkeys(request.POST.getlist("to"))
    if not (topics and 1 <= len(text) <= TEXT_LIMIT):
        return text_response(f"Choose who gets it, and write 1 to {TEXT_LIMIT} characters.", 400)
    allowed = addressees(request.user)
    try:
        with transaction.atomic():
            for topic in topics:
                if topic not in allowed:
                    raise PermissionError("You are not in that group.")  # rolls back what the loop has stored
                publish(Message.objects.create(topic=topic, sender=request.user, text=text))
    except PermissionError as error:
        return text_response(str(error), 403)
    return HttpResponse(status=204)


def publish(message: Message) -> None:
    """Tell the message's topic of it, once its transaction has been committed.

    Were it told at once, a page might hear of what is not there yet, or, after a rollback, never will be. Were the
    process to die in between, nobody would hear of it: if that matters, see "Events of a transaction" in the README.
    In a TestCase nothing is ever committed: there, captureOnCommitCallbacks(execute=True) helps.
    """
    transaction.on_commit(lambda: queue_event(QUEUE, "message", message.payload(), to=message.topic))


def text_response(text: str, status: int = 200) -> HttpResponse:
    return HttpResponse(text, status=status, content_type="text/plain; charset=utf-8")


urlpatterns = [
    path("", page, name="page"),
    path("login/", LoginView.as_view(), name="login"),
    path("logout/", LogoutView.as_view(http_method_names=["post"]), name="logout"),  # Django 4 took a GET, too
    path("messages/", messages, name="messages"),
    path("ticket/", ticket, name="ticket"),
]


# ── Starting ─────────────────────────────────────────────────────────────────────────────────────────────


def prepare_database() -> None:
    """Make the tables and the users, whose password is set anew."""
    os.makedirs(DIRECTORY, exist_ok=True)
    call_command("migrate", verbosity=0)
    if Message._meta.db_table not in connection.introspection.table_names():
        with connection.schema_editor() as editor:  # a project has migrations of its own instead
            editor.create_model(Message)
    password = make_password(PASSWORD)
    for username, groups in USERS.items():
        user, _ = User.objects.update_or_create(username=username, defaults={"password": password})
        user.groups.set([Group.objects.get_or_create(name=name)[0] for name in groups])
    connection.close()


def main() -> None:
    try:
        sign_ticket(push_secret())  # what is wrong with the secret should not wait for the first user
        # The server of `manage.py runserver`, without the autoreloader. That runs a program twice: of a push server
        # that was started in here, one would serve and one stand by. Deployed, this is gunicorn's place.
        with ThreadedWSGIServer((HOST, int(PORT)), WSGIRequestHandler) as web:
            prepare_database()
            web.set_app(get_wsgi_application())
            print(f"listening on http://{HOST}:{web.server_port}; ctrl-C ends")
            print(f"push server: {PUSH_URL}")
            if not os.environ.get("APP_PASSWORD"):
                print(f"log in as {', '.join(USERS)} with the password {PASSWORD}")
            sys.stdout.flush()
            web.serve_forever()
    except (WsqueueError, OSError, ValueError, OverflowError, DatabaseError) as error:
        sys.exit(f"cannot start at {HOST}:{PORT}: {error}. Check APP_HOST, APP_PORT, APP_DIRECTORY and WS_SECRET_FILE.")
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    main()
