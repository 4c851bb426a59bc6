// grpc-go, with messages made from what reflection serves.
// usage: client TARGET, where TARGET is `unix:/path` or `unix:///path`.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"github.com/jhump/protoreflect/v2/grpcreflect"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

const (
	service  = protoreflect.FullName("csrd.v1.CertificateService")
	deadline = 60 * time.Second
)

func main() {
	log.SetFlags(0)
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	conn := must(grpc.NewClient(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials())))
	defer conn.Close()

	answer := must(grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{}))
	check(answer.Status == grpc_health_v1.HealthCheckResponse_SERVING, answer)
	passed("health", answer.Status)

	reflection := grpcreflect.NewClientAuto(ctx, conn)
	served := must(reflection.ListServices())
	file := must(reflection.FileContainingSymbol(service))
	passed("reflection", fmt.Sprintf("%d services", len(served)))

	call := caller{ctx, conn, file.Services().ByName(service.Name()).Methods()}
	who := must(call.start("WhoAmI", `{}`).next())
	passed("whoami", who.at("facts", "unix.uid"))
	issue(call)
	refused(call)
	subscribe(call)
}

func issue(call caller) {
	stream := call.start("IssueCertificate", `{"request": {"dnsNames": ["client.test"]}}`)
	var stages []string
	event := must(stream.next())
	for ; event["stage"] != nil; event = must(stream.next()) {
		stages = append(stages, event.at("stage", "kind"))
	}
	check(len(stages) > 0 && stages[0] == "STAGE_KIND_ATTESTED", stages)
	check(event.at("certificate", "privateKey") != "" && event.at("certificate", "certificateChain") != "", event)
	_, err := stream.next()
	check(err == io.EOF, err)
	passed("issue", fmt.Sprintf("%d stages, then serial %s", len(stages), event.at("certificate", "serialNumber")))
}

func refused(call caller) {
	stream := call.start("IssueCertificate", `{"request": {"dnsNames": ["somebody-else.test"]}}`)
	var err error
	for err == nil {
		_, err = stream.next()
	}
	check(status.Code(err) == codes.PermissionDenied, err)
	passed("refused", status.Convert(err).Message())
}

func subscribe(call caller) {
	stream := call.start("Subscribe", `{"request": {"dnsNames": ["client.test"]}}`)
	first := must(stream.next())
	serial := first.at("current", "certificate", "serialNumber")
	passed("subscribe", fmt.Sprintf("current is %s, serial %s", first["sequence"], serial))
	event := must(stream.next())
	for event["renewed"] == nil {
		event = must(stream.next())
	}
	check(event.at("renewed", "certificate", "serialNumber") != serial, event)
	passed("renewed", fmt.Sprintf("%s, serial %s", event["sequence"], event.at("renewed", "certificate", "serialNumber")))
}

// caller starts calls by name, with requests in protobuf's JSON form.
type caller struct {
	ctx     context.Context
	conn    *grpc.ClientConn
	methods protoreflect.MethodDescriptors
}

func (c caller) start(name protoreflect.Name, request string) stream {
	method := c.methods.ByName(name)
	message := dynamicpb.NewMessage(method.Input())
	check(protojson.Unmarshal([]byte(request), message) == nil, request)
	call := must(c.conn.NewStream(c.ctx, &grpc.StreamDesc{ServerStreams: true}, fmt.Sprintf("/%s/%s", service, name)))
	// What went wrong is told by the first receive.
	_ = call.SendMsg(message)
	_ = call.CloseSend()
	return stream{call, method.Output()}
}

type stream struct {
	grpc.ClientStream
	output protoreflect.MessageDescriptor
}

func (s stream) next() (event, error) {
	message := dynamicpb.NewMessage(s.output)
	if err := s.RecvMsg(message); err != nil {
		return nil, err
	}
	var answer event
	return answer, json.Unmarshal(must(protojson.Marshal(message)), &answer)
}

// event is a message in protobuf's JSON form.
type event map[string]any

// at follows field names; what is not there is empty.
func (e event) at(names ...string) string {
	for _, name := range names[:len(names)-1] {
		e, _ = e[name].(map[string]any)
	}
	value, _ := e[names[len(names)-1]].(string)
	return value
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
