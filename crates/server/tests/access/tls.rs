//! Certificates that are exchanged while connections live.

use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use seawall_server::{
    auth::MASTERS,
    pki::{Authority, Pair},
    serve,
    tls::{ClientAuthorities, ServingCertificate, server_config},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream};

use super::harness::Api;

/// Answers each byte with 1 if the client has a certificate, else with 0.
async fn echo(listener: TcpListener, acceptor: TlsAcceptor) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            let Ok(mut stream) = acceptor.accept(stream).await else { return };
            let known = u8::from(stream.get_ref().1.peer_certificates().is_some());
            let mut byte = [0];
            while stream.read_exact(&mut byte).await.is_ok() {
                if stream.write_all(&[known]).await.is_err() || stream.flush().await.is_err() {
                    return;
                }
            }
        });
    }
}

fn client(trusted: &str, certificate: Option<&Pair>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for der in CertificateDer::pem_slice_iter(trusted.as_bytes()) {
        roots.add(der.unwrap()).unwrap();
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    Arc::new(match certificate {
        None => builder.with_no_client_auth(),
        Some(pair) => {
            let chain = CertificateDer::pem_slice_iter(pair.certificate.as_bytes()).map(Result::unwrap).collect();
            let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    })
}

async fn connect(port: u16, config: &Arc<ClientConfig>) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    TlsConnector::from(config.clone()).connect(ServerName::try_from("localhost").unwrap(), stream).await
}

/// One exchange: whether the server knows the client.
async fn ask(stream: &mut TlsStream<TcpStream>) -> std::io::Result<bool> {
    stream.write_all(b"?").await?;
    stream.flush().await?;
    let mut byte = [0];
    stream.read_exact(&mut byte).await?;
    Ok(byte[0] == 1)
}

/// With TLS 1.3 a client learns only from its first read that it was refused.
async fn known(port: u16, config: &Arc<ClientConfig>) -> std::io::Result<bool> {
    ask(&mut connect(port, config).await?).await
}

#[tokio::test]
async fn certificates_are_exchanged_under_living_connections() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (old, new) = (Authority::open(a.path()).unwrap(), Authority::open(b.path()).unwrap());
    let serving = |ca: &Authority| ca.server("api", "", &["localhost".into()], &[]).unwrap();
    let certificate = ServingCertificate::new(&serving(&old)).unwrap();
    let authorities = ClientAuthorities::new(&old.pem).unwrap();
    let config = server_config(certificate.clone(), authorities.clone(), &["http/1.1"]).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(echo(listener, TlsAcceptor::from(Arc::new(config))));
    let both = format!("{}{}", old.pem, new.pem);
    let (of_old, of_new) = (old.client("o", "").unwrap(), new.client("n", "").unwrap());

    let trusting_old = client(&old.pem, None);
    let mut living = connect(port, &trusting_old).await.unwrap();
    assert!(!ask(&mut living).await.unwrap(), "a client without a certificate is nobody");
    let with_old = client(&both, Some(&of_old));
    let mut authenticated = connect(port, &with_old).await.unwrap();
    assert!(ask(&mut authenticated).await.unwrap());
    let with_new = client(&both, Some(&of_new));
    let refused = known(port, &with_new).await.unwrap_err();
    // Two authorities of one name: the signature is what tells them apart.
    assert!(refused.to_string().contains("DecryptError"), "{refused}");

    // The serving certificate first.
    assert!(known(port, &client(&new.pem, None)).await.is_err(), "the new authority has not signed anything yet");
    let before = certificate.not_after();
    certificate.replace(&serving(&new)).unwrap();
    assert!(certificate.not_after() >= before && certificate.not_before() < certificate.not_after());
    assert!(!known(port, &client(&new.pem, None)).await.unwrap());
    assert!(known(port, &client(&old.pem, None)).await.is_err(), "who trusts the old one alone is told");
    assert!(!ask(&mut living).await.unwrap(), "the living connection goes on");

    // Then the authorities: both for a while, and then the new one alone.
    authorities.replace(&both).unwrap();
    assert!(known(port, &with_new).await.unwrap());
    assert!(known(port, &with_old).await.unwrap());
    authorities.replace(&new.pem).unwrap();
    assert!(known(port, &with_new).await.unwrap());
    assert!(known(port, &with_old).await.is_err(), "its session is not resumed either");
    assert!(ask(&mut authenticated).await.unwrap(), "the living connection goes on");
}

#[tokio::test]
async fn a_connection_ends_with_its_clients_certificate() {
    let api = Api::new().await;
    let certificate = api.authority.server("api", "", &["localhost".into()], &[]).unwrap();
    let tls = server_config(
        ServingCertificate::new(&certificate).unwrap(),
        ClientAuthorities::new(&api.authority.pem).unwrap(),
        &["http/1.1"],
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let stop = tokio_util::sync::CancellationToken::new();
    tokio::spawn(serve::serve(api.server.clone(), listener, tls.unwrap(), stop.clone()));
    // Made by hand, since nobody issues certificates that are this short.
    let ca_key = rcgen::KeyPair::from_pem(&api.authority.key_pem()).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_pem(&api.authority.pem, &ca_key).unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "short");
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    let end = u64::try_from(jiff::Timestamp::now().as_second()).unwrap() + 4;
    params.not_after = rcgen::date_time_ymd(1970, 1, 1) + std::time::Duration::from_secs(end);
    let key = rcgen::KeyPair::generate().unwrap();
    let short = Pair { certificate: params.signed_by(&key, &issuer).unwrap().pem(), key: key.serialize_pem() };
    let lasting = api.authority.client("lasting", "").unwrap();
    let (short, lasting) = (client(&api.authority.pem, Some(&short)), client(&api.authority.pem, Some(&lasting)));
    let mut ends = connect(port, &short).await.unwrap();
    let mut stays = connect(port, &lasting).await.unwrap();
    let ask = async |stream: &mut TlsStream<TcpStream>| -> std::io::Result<usize> {
        stream.write_all(b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n").await?;
        stream.flush().await?;
        let mut answer = [0; 4096];
        stream.read(&mut answer).await
    };
    assert!(ask(&mut ends).await.unwrap() > 0);
    let started = tokio::time::Instant::now();
    let mut rest = [0; 16];
    let closed = tokio::time::timeout(std::time::Duration::from_secs(30), ends.read(&mut rest)).await;
    assert!(matches!(closed, Ok(Ok(0) | Err(_))), "the connection is still open: {closed:?}");
    assert!(started.elapsed() < std::time::Duration::from_secs(20));
    assert!(ask(&mut stays).await.unwrap() > 0, "others go on");
    assert!(known(port, &short).await.is_err(), "it is not let in again, by its session either");
    stop.cancel();
}

#[test]
fn what_cannot_be_used_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::open(dir.path()).unwrap();
    let good = ca.server("api", "", &["localhost".into()], &[]).unwrap();
    let other = ca.server("api", "", &["localhost".into()], &[]).unwrap();
    let current = ServingCertificate::new(&good).unwrap();
    let check = |certificate: &str, key: &str, expect: &str| {
        let error = current.replace(&Pair { certificate: certificate.into(), key: key.into() }).unwrap_err();
        assert!(error.to_string().contains(expect), "{error}");
    };
    check("", &good.key, "the serving certificate holds no certificate");
    check(&good.certificate, "", "the serving key is not valid PEM");
    check(
        &good.certificate,
        &other.key,
        "the serving certificate cannot be used: keys may not be consistent: KeyMismatch",
    );
    assert_eq!(current.not_after(), seawall_server::tls::not_after(&good.certificate).unwrap());
    let clients = ClientAuthorities::new(&ca.pem).unwrap();
    let error = clients.replace("").unwrap_err();
    assert_eq!(error.to_string(), "the certificate authority of clients holds no certificate");
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let error = clients.replace(broken).unwrap_err();
    assert!(error.to_string().starts_with("the certificate authority of clients cannot be used: "), "{error}");
}

/// A server that is asked over HTTP/2 by an administrator, and who stops it.
async fn over_http2(api: &Api) -> (u16, Arc<ClientConfig>, tokio_util::sync::CancellationToken) {
    let certificate = api.authority.server("api", "", &["localhost".into()], &[]).unwrap();
    let tls = server_config(
        ServingCertificate::new(&certificate).unwrap(),
        ClientAuthorities::new(&api.authority.pem).unwrap(),
        &["h2", "http/1.1"],
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let stop = tokio_util::sync::CancellationToken::new();
    tokio::spawn(serve::serve(api.server.clone(), listener, tls.unwrap(), stop.clone()));
    let admin = api.authority.client("admin", MASTERS).unwrap();
    let mut config = ClientConfig::clone(&client(&api.authority.pem, Some(&admin)));
    config.alpn_protocols = vec![b"h2".to_vec()];
    (port, Arc::new(config), stop)
}

type Http2 = hyper::client::conn::http2::SendRequest<http_body_util::Full<bytes::Bytes>>;

async fn http2(port: u16, config: &Arc<ClientConfig>) -> (Http2, tokio::task::JoinHandle<()>) {
    use hyper_util::rt::{TokioExecutor, TokioIo};
    let stream = connect(port, config).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    (sender, tokio::spawn(async move { drop(connection.await) }))
}

fn request(method: &str, path: &str, body: &str) -> http::Request<http_body_util::Full<bytes::Bytes>> {
    let request = http::Request::builder().method(method).uri(format!("https://localhost{path}"));
    request.header("content-type", "application/json").body(http_body_util::Full::from(body.to_owned())).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stops_answers_what_it_was_asked() {
    use http_body_util::BodyExt;
    let api = Api::new().await;
    let (port, config, stop) = over_http2(&api).await;
    let (mut watching, watched) = http2(port, &config).await;
    let watch = watching.send_request(request("GET", "/api/v1/namespaces?watch=1", "")).await.unwrap();
    let (first, _connection) = http2(port, &config).await;
    // Requests come without a pause, on a connection that is open when the server stops.
    let busy = tokio::spawn(async move {
        let mut answered = 0;
        for i in 0.. {
            let mut sender = first.clone();
            // A connection that takes no more has been told to go.
            if sender.ready().await.is_err() {
                break;
            }
            let map = format!(r#"{{"metadata":{{"name":"m{i}"}}}}"#);
            let path = "/api/v1/namespaces/default/configmaps";
            match sender.try_send_request(request("POST", path, &map)).await {
                Ok(response) => {
                    assert_eq!(response.status(), 201);
                    response.into_body().collect().await.unwrap();
                    answered += 1;
                }
                // Not sent at all, which a client may do again elsewhere.
                Err(error) if error.message().is_some() => break,
                Err(error) => panic!("a request was cut off: {}", error.into_error()),
            }
        }
        answered
    });
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    stop.cancel();
    api.stop.cancel();
    let limit = std::time::Duration::from_secs(20);
    let answered = tokio::time::timeout(limit, busy).await.expect("the connection is left").unwrap();
    assert!(answered > 0);
    let ended = tokio::time::timeout(limit, watch.into_body().collect()).await.expect("the watch ends");
    assert!(ended.is_ok(), "and ends well: {:?}", ended.err());
    tokio::time::timeout(limit, watched).await.expect("its connection is closed").unwrap();
}

#[tokio::test]
async fn clients_are_told_to_come_again_elsewhere() {
    let api = Api::configured(|config| config.goaway_chance = 1.0).await;
    let (port, config, _stop) = over_http2(&api).await;
    let (mut sender, connection) = http2(port, &config).await;
    let response = sender.send_request(request("GET", "/version", "")).await.unwrap();
    assert_eq!(response.status(), 200);
    drop(response);
    tokio::time::timeout(std::time::Duration::from_secs(20), connection).await.expect("it is told to go").unwrap();
}
