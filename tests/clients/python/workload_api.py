"""py-spiffe, which finds the socket in SPIFFE_ENDPOINT_SOCKET. usage: workload_api.py"""

import threading

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from spiffe import SpiffeId, TrustDomain, WorkloadApiClient, X509Source
from spiffe.errors import PySpiffeError

DEADLINE_SECONDS = 60
DOMAIN = TrustDomain("example.org")
IDS = [SpiffeId("spiffe://example.org/client"), SpiffeId("spiffe://example.org/second")]


def passed(check, seen):
    print(f"ok {check}: {seen}", flush=True)


def public_key(key):
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def main():
    with WorkloadApiClient() as client:
        context = client.fetch_x509_context(timeout=DEADLINE_SECONDS)
        assert [svid.spiffe_id for svid in context.x509_svids] == IDS, context.x509_svids
        svid = context.default_svid
        assert public_key(svid.leaf.public_key()) == public_key(svid.private_key.public_key())
        passed("svids", ", ".join(str(svid.spiffe_id) for svid in context.x509_svids))

        bundle = client.fetch_x509_bundles(timeout=DEADLINE_SECONDS).get_bundle_for_trust_domain(DOMAIN)
        roots = bundle.x509_authorities
        assert roots == context.x509_bundle_set.get_bundle_for_trust_domain(DOMAIN).x509_authorities
        for root in roots:
            svid.leaf.verify_directly_issued_by(root)
        passed("bundles", f"{len(roots)} root of {DOMAIN}")

        try:
            client.fetch_jwt_svid({"a"}, timeout=DEADLINE_SECONDS)
            raise AssertionError("a JWT-SVID")
        except PySpiffeError as error:
            assert "JWT profile is switched off" in str(error), error
            passed("profiles", error)

    with X509Source(timeout_in_seconds=DEADLINE_SECONDS) as source:
        updated = threading.Event()
        before = serial(source)
        source.subscribe_for_updates(updated.set)
        while serial(source) == before:
            assert updated.wait(DEADLINE_SECONDS), "no update"
            updated.clear()
        passed("renewed", f"serial {serial(source):x}")


def serial(source):
    return source.get_x509_context().default_svid.leaf.serial_number


main()
