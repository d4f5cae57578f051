"""The brokers that tests start do what they are told, and so does the cable in front of them."""

import os
from concurrent.futures import ThreadPoolExecutor, wait

import pika
import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

import brokers
from brokers import Cutter
from helpers import TIME_UNIT, eventually

SHORT = 0.2 * TIME_UNIT  # how long a test waits for what is not to come
LONG = 20.0 * TIME_UNIT

AWAY = (OSError, redis.RedisError, psycopg.Error, pika.exceptions.AMQPError)


# ---- One value that a broker keeps, by its plain library ---------------------------------------------------


class RedisValue:
    def __init__(self, url):
        self._client = redis.Redis.from_url(url, socket_timeout=LONG, retry=Retry(NoBackoff(), 0))

    def __enter__(self):
        self._client.ping()
        return self

    def __exit__(self, *exc_info):
        self._client.close()

    def write(self, value):
        self._client.set("value", value)

    def read(self):
        return self._client.get("value").decode()


class PostgresValue:
    def __init__(self, url):
        self._url = url

    def __enter__(self):
        self._connection = psycopg.connect(self._url, autocommit=True)
        return self

    def __exit__(self, *exc_info):
        self._connection.close()

    def write(self, value):
        self._connection.execute("CREATE TABLE IF NOT EXISTS value (value text)")
        self._connection.execute("INSERT INTO value VALUES (%s)", [value])

    def read(self):
        return self._connection.execute("SELECT value FROM value").fetchone()[0]


class RabbitValue:
    def __init__(self, url):
        self._parameters = pika.URLParameters(url)

    def __enter__(self):
        self._connection = pika.BlockingConnection(self._parameters)
        self._channel = self._connection.channel()
        self._channel.confirm_delivery()
        return self

    def __exit__(self, *exc_info):
        if self._connection.is_open:
            self._connection.close()

    def write(self, value):
        self._channel.queue_declare("value", durable=True)
        properties = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
        self._channel.basic_publish("", "value", value.encode(), properties)
        self._channel.queue_declare("next", durable=True)  # with which the first is on the disk: see brokers.py

    def read(self):
        method, _, body = eventually(self._take, LONG, "the value, which another reader may have for a moment")
        self._channel.basic_nack(method.delivery_tag)
        return body.decode()

    def _take(self):
        taken = self._channel.basic_get("value")
        return taken if taken[0] else None


KINDS = {
    "redis": (brokers.redis_server, RedisValue),
    "postgres": (brokers.postgres_server, PostgresValue),
    "rabbitmq": (brokers.rabbitmq_server, RabbitValue),
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def kind(request):
    """A name of KINDS, whose broker is installed."""
    request.getfixturevalue(f"{request.param}_broker")
    return request.param


@pytest.fixture(scope="module")
def own(kind, tmp_path_factory):
    """A broker to be ill-treated, with a value, and what opens the latter."""
    server, value = KINDS[kind]
    with server(tmp_path_factory.mktemp(kind)) as broker:
        with value(broker.url) as connected:
            connected.write("kept")
        yield broker, value


@pytest.fixture
def through_cutter(kind, request):
    """A Cutter in front of a broker, and what opens a value through it."""
    broker, value = request.getfixturevalue(f"{kind}_broker"), KINDS[kind][1]
    with Cutter(broker.port) as cutter:
        yield cutter, lambda: value(broker.url.replace(f":{broker.port}", f":{cutter.port}"))


def ask(value):
    with value as connected:
        return connected.read()


# ---- Brokers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_ended_broker_is_gone_and_comes_back_with_its_data(own, end):
    """Neither way of ending leaves a process, and start() brings back the port and what was confirmed."""
    broker, value = own
    pid = broker.pid
    getattr(broker, end)()
    assert not os.path.exists(f"/proc/{pid}")
    with pytest.raises(AWAY):
        ask(value(broker.url))
    broker.start()
    assert broker.pid != pid
    assert ask(value(broker.url)) == "kept"


def test_frozen_broker_answers_when_it_is_thawed(own):
    """A frozen broker accepts connections, as the system does that for it, and answers nobody."""
    broker, value = own
    with ThreadPoolExecutor(1) as pool:
        broker.freeze()
        answer = pool.submit(ask, value(broker.url))
        assert wait([answer], SHORT).not_done
        broker.thaw()
        assert answer.result(LONG) == "kept"


def test_killed_twice_is_killed(own):
    """What ended already, or is frozen, can be killed."""
    broker, value = own
    broker.freeze()
    broker.kill()
    broker.kill()
    with pytest.raises(AWAY):
        ask(value(broker.url))


# ---- The cable ---------------------------------------------------------------------------------------------


def test_cut_cable_hangs_until_it_is_healed(through_cutter):
    """While the cable is cut, the open connection and a new one wait; healed, both get their answers."""
    cutter, value = through_cutter
    with value() as connected, ThreadPoolExecutor(2) as pool:
        connected.write("kept")
        cutter.cut()
        answers = [pool.submit(connected.read), pool.submit(ask, value())]
        assert not wait(answers, SHORT).done
        cutter.heal()
        assert [answer.result(LONG) for answer in answers] == ["kept", "kept"]


def test_refusing_cable_ends_connections_until_it_is_healed(through_cutter):
    """Refused, the open connection breaks and a new one is not made; healed, a new one is."""
    cutter, value = through_cutter
    with value() as connected:
        connected.write("kept")
        cutter.refuse()
        with pytest.raises(AWAY):
            connected.read()
    with pytest.raises(AWAY):
        ask(value())
    cutter.heal()
    assert ask(value()) == "kept"


def test_refused_while_cut_is_refused(through_cutter):
    """What hung because of the cut breaks when the cable refuses."""
    cutter, value = through_cutter
    with value() as connected, ThreadPoolExecutor(1) as pool:
        cutter.cut()
        answer = pool.submit(connected.read)
        cutter.refuse()
        with pytest.raises(AWAY):
            answer.result(LONG)
