//! DNS of a made-up cluster on the loopback, to be measured: `loopback ADDRESS:PORT SERVICES [UPSTREAM:PORT]`.
//! Service `s0` to `s<SERVICES - 1>` of the namespace `default` have an address each, and `many` has twenty endpoints.

use std::{net::SocketAddr, sync::Arc};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use seawall_dns::{
    facts::{Endpoint, Port, Service, Slice},
    forward::Forwarder,
    metrics::Metrics,
    resolver::Resolver,
    serve::{How, Sockets},
    settings::{Settings, server},
    zone::{Book, Shape},
};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut words = std::env::args().skip(1);
    let mut word = || words.next().context("loopback ADDRESS:PORT SERVICES [UPSTREAM:PORT]");
    let (on, count) = (word()?.parse::<SocketAddr>()?, word()?.parse::<u32>()?);
    let upstream = word().ok().map(|text| server(&text)).transpose()?;
    let mut book = Book::new(Arc::new(Shape::new("cluster.local", Vec::new(), Vec::new())?));
    let port = Port { name: "http".into(), protocol: "tcp".into(), number: 80 };
    for i in 0..count {
        let ip = std::net::Ipv4Addr::from(0x0a60_0000 + i + 1);
        book.set_service(Service {
            namespace: "default".into(),
            name: format!("s{i}"),
            cluster_ips: vec![ip.into()],
            ports: vec![port.clone()],
            ..Service::default()
        });
    }
    let many = || ("default".to_owned(), "many".to_owned());
    book.set_service(Service { namespace: many().0, name: many().1, headless: true, ..Service::default() });
    let endpoint = |i: u8| Endpoint { addresses: vec![[10, 244, 0, i].into()], ready: true, ..Endpoint::default() };
    book.set_slice(Slice {
        namespace: many().0,
        name: "many-1".into(),
        service: many().1,
        ports: vec![port],
        endpoints: (0..20).map(endpoint).collect(),
    });
    let metrics = Metrics::default();
    let settings = Settings { upstream: upstream.into_iter().collect(), ..Settings::default() };
    let zone = Arc::new(ArcSwap::from_pointee(book.zone().clone()));
    let resolver = Resolver::new(zone, Forwarder::new(settings, metrics.clone()), metrics);
    Sockets::bind(on, How::default())?.serve(resolver, CancellationToken::new()).await;
    Ok(())
}
