"""gRPC-core as Python ships it. usage: client.py TARGET PROTO_FOLDER [RESTART]

TARGET is `unix:/path` or `unix:///path`; RESTART is a command that ends the agent and returns when
its successor has been started.
"""

import subprocess
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from google.rpc import error_details_pb2

SERVICE = "csrd.v1.CertificateService"
DEADLINE_SECONDS = 60

target, protos, *restart = sys.argv[1:]
sys.path.insert(0, protos)
messages, services = grpc.protos_and_services("csrd/v1/certificate.proto")


def passed(check, seen):
    print(f"ok {check}: {seen}", flush=True)


def certificate_request(name):
    return messages.CertificateRequest(dns_names=[name])


def issue(stub):
    request = messages.IssueCertificateRequest(request=certificate_request("client.test"))
    events = list(stub.IssueCertificate(request, timeout=DEADLINE_SECONDS))
    kinds = [event.stage.kind for event in events[:-1]]
    assert kinds == sorted(kinds) and messages.STAGE_KIND_ATTESTED in kinds, events
    certificate = events[-1].certificate
    assert certificate.certificate_chain.startswith(b"-----BEGIN CERTIFICATE-----"), certificate
    assert certificate.private_key.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert certificate.trust_bundle.startswith(b"-----BEGIN CERTIFICATE-----"), certificate
    return f"{len(kinds)} stages, then serial {certificate.serial_number}"


def refused(stub):
    request = messages.IssueCertificateRequest(request=certificate_request("somebody-else.test"))
    try:
        list(stub.IssueCertificate(request, timeout=DEADLINE_SECONDS))
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.PERMISSION_DENIED, error
        info = error_details_pb2.ErrorInfo()
        assert any(detail.Unpack(info) for detail in rpc_status.from_call(error).details), error
        assert info.domain == "csrd.dev" and info.reason, info
        return f"{info.reason}, {error.details()}"
    raise AssertionError("a name that no policy allows was granted")


def subscribe(stub, **wanted):
    wanted.setdefault("request", certificate_request("client.test"))
    # The agent may be on its way up again; the channel is the old one.
    return stub.Subscribe(messages.SubscribeRequest(**wanted), timeout=DEADLINE_SECONDS, wait_for_ready=True)


def certificate_of(event):
    kind = event.WhichOneof("event")
    return getattr(event, kind).certificate if kind in ("current", "renewed") else None


def main():
    with grpc.insecure_channel(target) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_SECONDS)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, answer
        passed("health", "SERVING")

        served = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert SERVICE in served, served
        passed("reflection", f"{len(served)} services")

        stub = services.CertificateServiceStub(channel)
        passed("whoami", dict(stub.WhoAmI(messages.WhoAmIRequest(), timeout=DEADLINE_SECONDS).facts)["unix.uid"])
        passed("issue", issue(stub))
        passed("refused", refused(stub))

        stream = subscribe(stub)
        first = next(stream)
        assert first.WhichOneof("event") == "current", first
        passed("subscribe", f"current is {first.sequence}, serial {first.current.certificate.serial_number}")

        last = next(event for event in stream if event.WhichOneof("event") == "renewed")
        assert last.sequence > first.sequence, (first, last)
        assert last.renewed.certificate.serial_number != first.current.certificate.serial_number
        passed("renewed", f"{last.sequence}, serial {last.renewed.certificate.serial_number}")

        if restart:
            survive_a_restart(stub, stream, last)


def survive_a_restart(stub, stream, last):
    subprocess.run(restart, check=True)
    before = last.renewed.certificate
    try:
        for last in stream:
            before = certificate_of(last) or before
        raise AssertionError("the stream ended with OK")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.UNAVAILABLE, error
    resumed = next(subscribe(stub, certificate_id=before.certificate_id, after_sequence=last.sequence))
    assert resumed.sequence > last.sequence, (last.sequence, resumed)
    assert certificate_of(resumed).serial_number != before.serial_number, resumed
    passed("resumed", f"{resumed.sequence} follows {last.sequence} across a restart")


main()
