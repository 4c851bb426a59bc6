// Envoy's own messages, over both kinds of stream. usage: sds TARGET, where TARGET is `unix:/path` or `unix:///path`.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"strings"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	sds "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/anypb"
)

const (
	typeURL  = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
	deadline = 60 * time.Second
	client   = "spiffe://example.org/client"
)

func main() {
	log.SetFlags(0)
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	conn := must(grpc.NewClient(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials())))
	defer conn.Close()
	service := sds.NewSecretDiscoveryServiceClient(conn)
	fetch(ctx, service)
	world(ctx, service)
	delta(ctx, service)
}

func fetch(ctx context.Context, service sds.SecretDiscoveryServiceClient) {
	names := []string{"default", client, "ROOTCA", "ALL", "file-root:system"}
	response := must(service.FetchSecrets(ctx, &discovery.DiscoveryRequest{ResourceNames: names, TypeUrl: typeURL}))
	secrets := unpack(response.Resources)
	check(len(secrets) == 4 && secrets["file-root:system"] == nil, response)
	for _, name := range []string{"default", client} {
		certificate := secrets[name].GetTlsCertificate()
		chain, key := certificate.GetCertificateChain().GetInlineBytes(), certificate.GetPrivateKey().GetInlineBytes()
		check(strings.HasPrefix(string(chain), "-----BEGIN CERTIFICATE-----"), name)
		check(strings.HasPrefix(string(key), "-----BEGIN PRIVATE KEY-----"), name)
	}
	for _, name := range []string{"ROOTCA", "ALL"} {
		validator := secrets[name].GetValidationContext().GetCustomValidatorConfig()
		check(validator.GetName() == "envoy.tls.cert_validator.spiffe", validator)
		config := new(tls.SPIFFECertValidatorConfig)
		check(validator.TypedConfig.UnmarshalTo(config) == nil, validator)
		check(len(config.TrustDomains) == 1 && config.TrustDomains[0].Name == "example.org", config)
	}
	passed("fetch", fmt.Sprintf("%d of %d names, aliases among them", len(secrets), len(names)))
}

func world(ctx context.Context, service sds.SecretDiscoveryServiceClient) {
	stream := must(service.StreamSecrets(ctx))
	names := []string{"default", "no-such-name"}
	node := &core.Node{Id: "envoy", Cluster: "test"}
	send := func(request *discovery.DiscoveryRequest) { check(stream.Send(request) == nil, request) }
	send(&discovery.DiscoveryRequest{Node: node, ResourceNames: names, TypeUrl: typeURL})
	first := must(stream.Recv())
	check(len(first.Resources) == 1 && first.TypeUrl == typeURL && first.Nonce != "", first)
	passed("world", fmt.Sprintf("version %s without the name that finds nothing", first.VersionInfo))

	// Not taken: the next response is the next certificate, and not this one again.
	refusal := &rpc.Status{Code: 13, Message: "for a test"}
	send(&discovery.DiscoveryRequest{ResourceNames: names, TypeUrl: typeURL, ResponseNonce: first.Nonce, ErrorDetail: refusal})
	renewed := must(stream.Recv())
	check(renewed.VersionInfo != first.VersionInfo && renewed.Nonce != first.Nonce, renewed)
	check(chainOf(renewed.Resources[0]) != chainOf(first.Resources[0]), "the same certificate again")
	passed("renewed", fmt.Sprintf("version %s after a NACK", renewed.VersionInfo))

	names = append(names, "ROOTCA")
	send(&discovery.DiscoveryRequest{
		ResourceNames: names, TypeUrl: typeURL, VersionInfo: renewed.VersionInfo, ResponseNonce: renewed.Nonce,
	})
	more := must(stream.Recv())
	for unpack(more.Resources)["ROOTCA"] == nil {
		more = must(stream.Recv())
	}
	check(len(more.Resources) == 2, more)
	passed("names", fmt.Sprintf("version %s with one more", more.VersionInfo))
}

func delta(ctx context.Context, service sds.SecretDiscoveryServiceClient) {
	stream := must(service.DeltaSecrets(ctx))
	send := func(request *discovery.DeltaDiscoveryRequest) { check(stream.Send(request) == nil, request) }
	send(&discovery.DeltaDiscoveryRequest{
		TypeUrl: typeURL, ResourceNamesSubscribe: []string{client, "ROOTCA", "no-such-name"},
	})
	first := must(stream.Recv())
	check(len(first.Resources) == 2 && len(first.RemovedResources) == 1, first)
	check(first.RemovedResources[0] == "no-such-name", first)
	passed("delta", fmt.Sprintf("%d secrets, and %s is not there", len(first.Resources), first.RemovedResources[0]))
	send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResponseNonce: first.Nonce})
	renewed := must(stream.Recv())
	check(len(renewed.Resources) == 1 && renewed.Resources[0].Name == client, renewed)
	passed("renewed", fmt.Sprintf("only %s, version %s", renewed.Resources[0].Name, renewed.Resources[0].Version))
	send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesUnsubscribe: []string{client}})
	send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{"default"}})
	alias := must(stream.Recv())
	for len(alias.Resources) != 1 || alias.Resources[0].Name != "default" {
		alias = must(stream.Recv())
	}
	passed("alias", alias.Resources[0].Name)
}

func unpack(resources []*anypb.Any) map[string]*tls.Secret {
	secrets := make(map[string]*tls.Secret)
	for _, resource := range resources {
		secret := new(tls.Secret)
		check(resource.UnmarshalTo(secret) == nil, resource)
		secrets[secret.Name] = secret
	}
	return secrets
}

func chainOf(resource *anypb.Any) string {
	for _, secret := range unpack([]*anypb.Any{resource}) {
		return string(secret.GetTlsCertificate().GetCertificateChain().GetInlineBytes())
	}
	return ""
}

func passed(name string, seen any) { fmt.Printf("ok %s: %v\n", name, seen) }

func check(holds bool, seen any) {
	if !holds {
		log.Fatalf("not as expected: %v", seen)
	}
}

func must[T any](value T, err error) T {
	check(err == nil, err)
	return value
}
