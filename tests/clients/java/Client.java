import csrd.v1.CertificateOuterClass.CertificateRequest;
import csrd.v1.CertificateOuterClass.IssueCertificateRequest;
import csrd.v1.CertificateOuterClass.IssueCertificateResponse;
import csrd.v1.CertificateOuterClass.StageKind;
import csrd.v1.CertificateOuterClass.SubscribeRequest;
import csrd.v1.CertificateOuterClass.SubscribeResponse;
import csrd.v1.CertificateOuterClass.WhoAmIRequest;
import csrd.v1.CertificateServiceGrpc;
import csrd.v1.CertificateServiceGrpc.CertificateServiceBlockingStub;
import io.grpc.Channel;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.health.v1.HealthCheckRequest;
import io.grpc.health.v1.HealthCheckResponse.ServingStatus;
import io.grpc.health.v1.HealthGrpc;
import io.grpc.netty.NettyChannelBuilder;
import io.grpc.reflection.v1.ServerReflectionGrpc;
import io.grpc.reflection.v1.ServerReflectionRequest;
import io.grpc.reflection.v1.ServerReflectionResponse;
import io.grpc.reflection.v1.ServiceResponse;
import io.grpc.stub.StreamObserver;
import io.netty.channel.MultiThreadIoEventLoopGroup;
import io.netty.channel.epoll.EpollDomainSocketChannel;
import io.netty.channel.epoll.EpollIoHandler;
import io.netty.channel.unix.DomainSocketAddress;
import java.util.ArrayList;
import java.util.Iterator;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;

/** grpc-java over netty's epoll sockets. Argument: `unix:/path` or `unix:///path`, or `/path` for a socket address. */
public final class Client {
  private static final int DEADLINE_SECONDS = 60;

  public static void main(String[] arguments) throws Exception {
    String target = arguments[0];
    if (target.startsWith("unix:")) {
      run(Grpc.newChannelBuilder(target, InsecureChannelCredentials.create()).build());
      return;
    }
    var group = new MultiThreadIoEventLoopGroup(1, EpollIoHandler.newFactory());
    run(NettyChannelBuilder.forAddress(new DomainSocketAddress(target))
        .channelType(EpollDomainSocketChannel.class)
        .eventLoopGroup(group)
        .usePlaintext()
        .build());
    group.shutdownGracefully(0, DEADLINE_SECONDS, TimeUnit.SECONDS).sync();
  }

  private static void run(ManagedChannel channel) throws Exception {
    try {
      var health = HealthGrpc.newBlockingStub(channel).withDeadlineAfter(DEADLINE_SECONDS, TimeUnit.SECONDS);
      var status = health.check(HealthCheckRequest.getDefaultInstance()).getStatus();
      check(status == ServingStatus.SERVING, status);
      passed("health", status);

      List<String> services = reflection(channel);
      check(services.contains(CertificateServiceGrpc.SERVICE_NAME), services);
      passed("reflection", services.size() + " services");

      var stub = CertificateServiceGrpc.newBlockingStub(channel).withDeadlineAfter(DEADLINE_SECONDS, TimeUnit.SECONDS);
      passed("whoami", stub.whoAmI(WhoAmIRequest.getDefaultInstance()).getFactsOrThrow("unix.uid"));
      issue(stub);
      refused(stub);
      subscribe(stub);
    } finally {
      channel.shutdownNow().awaitTermination(DEADLINE_SECONDS, TimeUnit.SECONDS);
    }
  }

  private static List<String> reflection(Channel channel) throws Exception {
    var answer = new CompletableFuture<ServerReflectionResponse>();
    var requests = ServerReflectionGrpc.newStub(channel).serverReflectionInfo(new StreamObserver<>() {
      @Override public void onNext(ServerReflectionResponse response) {
        answer.complete(response);
      }

      @Override public void onError(Throwable error) {
        answer.completeExceptionally(error);
      }

      @Override public void onCompleted() {}
    });
    requests.onNext(ServerReflectionRequest.newBuilder().setListServices("").build());
    var services = answer.get(DEADLINE_SECONDS, TimeUnit.SECONDS).getListServicesResponse().getServiceList();
    requests.onCompleted();
    return services.stream().map(ServiceResponse::getName).toList();
  }

  private static void issue(CertificateServiceBlockingStub stub) {
    List<StageKind> stages = new ArrayList<>();
    for (var events = stub.issueCertificate(requestFor("client.test")); events.hasNext();) {
      IssueCertificateResponse event = events.next();
      if (event.hasStage()) {
        stages.add(event.getStage().getKind());
        continue;
      }
      var certificate = event.getCertificate();
      check(stages.contains(StageKind.STAGE_KIND_ATTESTED), stages);
      check(certificate.getCertificateChain().toStringUtf8().startsWith("-----BEGIN CERTIFICATE-----"), certificate);
      check(certificate.getPrivateKey().toStringUtf8().startsWith("-----BEGIN PRIVATE KEY-----"), "the key");
      check(!events.hasNext(), "an event after the certificate");
      passed("issue", stages.size() + " stages, then serial " + certificate.getSerialNumber());
      return;
    }
    check(false, "no certificate");
  }

  private static void refused(CertificateServiceBlockingStub stub) {
    try {
      stub.issueCertificate(requestFor("somebody-else.test")).forEachRemaining(event -> {});
      check(false, "a name that no policy allows was granted");
    } catch (StatusRuntimeException error) {
      check(error.getStatus().getCode() == Status.Code.PERMISSION_DENIED, error);
      passed("refused", error.getStatus().getDescription());
    }
  }

  private static void subscribe(CertificateServiceBlockingStub stub) {
    var request = requestFor("client.test").getRequest();
    Iterator<SubscribeResponse> events = stub.subscribe(SubscribeRequest.newBuilder().setRequest(request).build());
    SubscribeResponse first = events.next();
    String serial = first.getCurrent().getCertificate().getSerialNumber();
    passed("subscribe", "current is " + first.getSequence() + ", serial " + serial);
    SubscribeResponse event = events.next();
    while (!event.hasRenewed()) {
      event = events.next();
    }
    String renewed = event.getRenewed().getCertificate().getSerialNumber();
    check(event.getSequence() > first.getSequence() && !renewed.equals(serial), event.getSequence());
    passed("renewed", event.getSequence() + ", serial " + renewed);
  }

  private static IssueCertificateRequest requestFor(String name) {
    return IssueCertificateRequest.newBuilder().setRequest(CertificateRequest.newBuilder().addDnsNames(name)).build();
  }

  private static void passed(String check, Object seen) {
    System.out.println("ok " + check + ": " + seen);
  }

  private static void check(boolean holds, Object seen) {
    if (!holds) {
      throw new AssertionError("not as expected: " + seen);
    }
  }
}
