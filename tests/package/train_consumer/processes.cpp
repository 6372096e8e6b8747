// Ranks as processes, by whatever started them.
#include "dualpipe/comm/socket.hpp"
#include "dualpipe/launch/world.hpp"
#include "train.hpp"

int main() { train(dualpipe::connect_sockets(dualpipe::World::from_env())); }
