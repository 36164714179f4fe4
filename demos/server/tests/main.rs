//! The server as clients see it: over real connections, in this process, with the model inside the agent.

mod api;
mod losses;
mod malformed;
mod openai;
mod refused;
mod shutdown;
mod soak;
mod util;
