# A static binary and nothing else: no shell, no package manager, no library, nobody's user.
# Try it:  docker build -t csrd . && docker run --rm csrd demo --renewals 2

# The index of all architectures, which a tag could be moved away from. To bring it up to date:
# docker buildx imagetools inspect rust:1.95-slim-bookworm
FROM rust:1.95-slim-bookworm@sha256:d7482085ff5b415f84dba5647ae71606650bdef00db7aeb69f4b3d170c3e4082 AS build
# The packages of one Debian release; pinning their versions would break the build at the next security fix.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends musl-tools \
 && rm -rf /var/lib/apt/lists/* \
 && rustup target add "$(uname -m)-unknown-linux-musl"
WORKDIR /csrd
COPY Cargo.toml Cargo.lock build.rs ./
COPY proto proto
COPY src src
# The image's folders: where the agent keeps its CA, where it puts the socket, and scratch space for the demo.
RUN cargo build --locked --release --target "$(uname -m)-unknown-linux-musl" \
 && mkdir -p image/run/csrd image/var/lib/csrd image/etc/csrd/policies image/tmp \
 && chmod 0700 image/var/lib/csrd \
 && cp "target/$(uname -m)-unknown-linux-musl/release/csrd" /usr/local/bin/csrd

FROM scratch
COPY --from=build /usr/local/bin/csrd /csrd
COPY --from=build --chown=65532:65532 /csrd/image/ /
# An agent looks at processes of other users: give it CAP_SYS_PTRACE and the host's process ids.
USER 65532:65532
ENTRYPOINT ["/csrd"]
