//! Connections: how many, how slow they may be, and how they end.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;

use crate::api::{self, App};

/// What connections may take.
#[derive(Debug, Clone)]
pub struct Connections {
    /// How many may be open.
    pub most: usize,
    /// How long the head of a request may take, and a client to take a piece of its answer.
    pub patience: Duration,
    /// How long running answers may go on once the server stops.
    pub grace: Duration,
}

/// Bytes of a request's head.
const HEAD: usize = 64 << 10;
/// For the last words, when answers have been ended.
const FAREWELL: Duration = Duration::from_secs(2);
/// After the system refused a connection, as it does when it has no more files.
const PAUSE: Duration = Duration::from_millis(50);

/// Serves until `stop`, then lets running answers end; `now` ends them at once.
///
/// # Errors
/// None so far: what goes wrong with a connection ends that connection.
pub async fn serve(
    listener: TcpListener,
    app: Arc<App>,
    limits: Connections,
    stop: impl Future<Output = ()>,
    now: impl Future<Output = ()>,
) -> Result<()> {
    let router = api::router(app.clone());
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(limits.most));
    let mut stop = pin!(stop);
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await;
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            accepted = accepted => accepted,
            () = &mut stop => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(why) => {
                log::warn!("a connection was not accepted: {why}");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let io = TokioIo::new(Box::pin(patient(stream, limits.patience)));
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(limits.patience).max_buf_size(HEAD);
        let connection = http.serve_connection(io, TowerToHyperService::new(router.clone()));
        let connection = graceful.watch(connection);
        let app = app.clone();
        tokio::spawn(async move {
            app.metrics.connection(1);
            if let Err(why) = connection.await {
                log::debug!("a connection ended: {why}");
            }
            app.metrics.connection(-1);
            drop(place);
        });
    }
    drop(listener);
    log::info!("stopping; running answers have {} s", limits.grace.as_secs_f32());
    app.stopping.store(true, Ordering::Relaxed);
    app.desk.drain();
    let mut done = pin!(graceful.shutdown());
    let ended = tokio::select! {
        () = &mut done => true,
        () = tokio::time::sleep(limits.grace) => false,
        () = now => false,
    };
    app.desk.stop();
    if !ended && tokio::time::timeout(FAREWELL, done).await.is_err() {
        log::warn!("connections were cut");
    }
    Ok(())
}

/// A connection whose client has to take what is sent. How long a request takes to arrive is watched where it is read.
fn patient(stream: TcpStream, patience: Duration) -> TimeoutStream<TcpStream> {
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(patience));
    stream
}
