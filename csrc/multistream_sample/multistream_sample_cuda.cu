// multistream_sample on the GPU: one launch, a block per request and stream. A stream behind stream 0 is sampled before
// it is known whether it has content, which stream 0's token decides; the last block of a request to arrive has all
// tokens and moves the request on.
#include "multistream_sample/device/select.cuh"

namespace speechlm {
namespace {

// In is_content, until the last block reads it.
constexpr uint8_t kHasToken = 1, kHasFailed = 3;
constexpr int kCachedLogits = 6144;

// A block's dynamic shared memory: logits, then a bit per column of the widest stream.
struct DynamicMemory {
  int cached;
  int words;
};

struct Result {
  int64_t token;
  float logprob;
  bool has_failed;
};

// A thread's largest and smallest logit, as numbers for block_max.
struct Extremes {
  Wide best = 0;   // ~rank
  Wide least = 0;  // ~key of the smallest that is not -inf

  __device__ void update(float x, int place) {
    const Wide rank = ~rank_of(x, place), key = x > -INFINITY ? Wide{~key_of(x)} : 0;
    best = rank > best ? rank : best;
    least = key > least ? key : least;
  }
};

// Sets the bits of the places whose ids the stream had in the last rows. Returns whether there are any.
template <typename T>
__device__ bool mark_repeated(const SampleState& a, const Position& p, const StreamRow& row, int64_t b, int64_t s,
                              const BlockScope<T>& scope, unsigned* bits) {
  const int64_t window = a.choice[row.settings].repetition_window;
  const int64_t begin = p.row > window ? p.row - window : 0;
  const int64_t end = p.row < a.num_history ? p.row : a.num_history;
  for (int i = thread_index(); i <= scope.size / 32; i += kSampleThreads) bits[i] = 0;
  __syncthreads();
  int found = 0;
  for (int64_t r = begin + thread_index(); r < end; r += kSampleThreads) {
    const int64_t id = a.history[(b * a.num_history + r) * a.num_streams + s];
    const int64_t column = s == 0 && id == a.eos_id ? -1 : column_of(a, s, id);
    if (column < row.first || column >= row.last) continue;
    const int place = scope.place_of(column);
    atomicOr(&bits[place / 32], 1u << place % 32);
    found = 1;
  }
  return __syncthreads_or(found) != 0;
}

// The place that is chosen. `extremes`: of the logits after the penalty. The random number is made where it is used: a
// thread has no registers to spare for it.
template <typename T>
__device__ int choose(BlockMemory& m, const BlockScope<T>& scope, const SampleSettings& settings,
                      const SampleChoice& choice, const Extremes& extremes, const SampleState& a, int64_t b,
                      int64_t s) {
  const Wide best = ~block_max(m, extremes.best);
  if (is_greedy(settings, choice)) return static_cast<int>(best & 0xffffffffu);
  const Weigher weigh{logit_of_rank(best), settings.temperature};
  const int64_t k = kept_by(choice.top_k, scope.size);
  Wide border = kNoBorder;
  if (k < scope.size || settings.top_p < 1) {
    const float smallest = value_of(~static_cast<uint32_t>(block_max(m, extremes.least)));
    const Buckets buckets(weigh.largest, smallest);
    if (k < scope.size) border = find_border(m, scope, buckets, CountOne{}, static_cast<Wide>(k));
    if (settings.top_p < 1) {
      const auto sum = static_cast<int64_t>(sum_of_kept(m, scope, weigh, border));
      border = find_border(m, scope, buckets, weigh, static_cast<Wide>(top_p_limit(settings.top_p, sum)));
    }
  }
  const double number = uniform(a.request[b].seed, m.position.row, s);
  return draw(m, scope, weigh, border, static_cast<Wide>(min_weight(settings.min_p)), number);
}

// The token of a stream that may have content; the same in every thread.
template <typename T>
__device__ Result sample(BlockMemory& m, const SampleArgs<T>& args, const Position& p, const StreamRow& row, int64_t b,
                         int64_t s, const DynamicMemory& room, float* cache) {
  const SampleState& a = args.state;
  const int64_t forced = forced_token(a, p, b, s);
  int64_t forced_column = -1;
  if (forced >= 0) {
    forced_column = column_of(a, s, forced);
    const bool is_end = s == 0 && forced_column == a.eos_column;
    const bool is_in_scope = is_end ? row.may_end : forced_column >= row.first && forced_column < row.last;
    const bool is_allowed =
        a.allowed == nullptr || forced_column < 0 || a.allowed[b * a.allowed_stride + forced_column] != 0;
    if (forced_column < 0 || !is_in_scope || !is_allowed) return {forced, 0.0f, false};
  }
  BlockScope<T> scope;
  int is_bad = scope.open(args, row, b, s, cache, room.cached) ? 0 : 1;
  Extremes extremes;
  for (int place = thread_index(); place < scope.size && is_bad == 0; place += kSampleThreads) {
    const float x = scope.load(place);
    if (x != x || x == INFINITY) is_bad = 1;
    extremes.update(x, place);
  }
  is_bad = __syncthreads_or(is_bad);
  const float largest = logit_of_rank(~block_max(m, extremes.best));
  if (is_bad != 0 || !(largest > -INFINITY)) {
    if (forced >= 0) return {forced, NAN, false};
    return {s == 0 ? a.eos_id : a.pad_ids[s], 0.0f, true};
  }
  Wide sum = 0;
  const Weigher at_one{largest, 1.0f};
  for (int place = thread_index(); place < scope.size; place += kSampleThreads) sum += at_one(scope.raw(place));
  const auto total = static_cast<int64_t>(block_sum(m, sum));
  if (forced >= 0) return {forced, logprob_of(scope.raw(scope.place_of(forced_column)), largest, total), false};
  const SampleSettings& settings = a.settings[row.settings];
  const SampleChoice& choice = a.choice[row.settings];
  auto* bits = reinterpret_cast<unsigned*>(cache + room.cached);
  if (room.words > 0 && has_penalty(settings, choice) && mark_repeated(a, p, row, b, s, scope, bits)) {
    scope.penalize(bits, settings.repetition_penalty);
    extremes = Extremes();
    for (int place = thread_index(); place < scope.size; place += kSampleThreads) extremes.update(scope(place), place);
  }
  const int place = choose(m, scope, settings, choice, extremes, a, b, s);
  return {a.column_ids[scope.column_at(place)], logprob_of(scope.raw(place), largest, total), false};
}

// By the block that is the last one of its request: a thread per stream. Streams before those of this launch are as the
// launches before have left them; those behind are fill as yet.
__device__ void finish_request(BlockMemory& m, const SampleState& a, int64_t b) {
  const Position p = m.position;  // read again, for registers
  const int s = thread_index();
  const int64_t at = b * a.num_streams + s;
  const bool is_stream = s < a.num_streams, is_sampled = s >= a.first_stream && s < a.end_stream;
  const bool is_complete = a.end_stream == a.num_streams;
  const int64_t first_token = __ldcg(&a.tokens[b * a.num_streams]);
  const int64_t ended = ended_by(a, p, stream_row(a, p, b, 0), first_token);
  bool is_content = false, has_failed = false;
  if (is_sampled) {
    is_content = has_content(stream_row(a, p, b, s), s, s == 0 ? p.finish : ended);
    has_failed = is_content && __ldcg(&a.is_content[at]) == kHasFailed;
  } else if (s < a.first_stream) {
    is_content = a.is_content[at] != 0;
    has_failed = a.failed[b] != 0;
  }
  has_failed = __syncthreads_or(has_failed ? 1 : 0) != 0;
  const Wide slowest = block_max(m, is_stream ? static_cast<Wide>(used_delay(a, p, b, s)) : 0);
  if (is_stream) {
    int64_t token = __ldcg(&a.tokens[at]);
    float logprob = __ldcg(&a.logprob[at]);
    if (s >= a.first_stream && !is_content) {
      const int64_t forced = is_sampled ? forced_token(a, p, b, s) : -1;
      token = forced >= 0 ? forced : fill_token(a, p, b, s);
      logprob = 0.0f;
    } else if (s == 0 && is_content && has_failed && is_complete) {
      token = a.eos_id;
      logprob = 0.0f;
    }
    a.tokens[at] = token;
    a.logprob[at] = logprob;
    a.is_content[at] = is_content ? 1 : 0;
    const int64_t kept_row = is_complete ? history_row(a, p, b) : -1;
    if (kept_row >= 0) {
      a.history[kept_row * a.num_streams + s] = token;
      a.history_logprob[kept_row * a.num_streams + s] = is_content ? logprob : NAN;
    }
  }
  if (s != 0) return;
  if (p.done || !is_complete) {
    a.progress[b].arrived = 0;
  } else {
    advance(a, p, b, has_failed, ended, static_cast<int64_t>(slowest));
  }
  a.failed[b] = has_failed ? 1 : 0;
  a.done[b] = a.progress[b].done != 0 ? 1 : 0;
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads, 3) sample_kernel(const SampleArgs<T> args, const DynamicMemory room) {
  SX_SHARED(BlockMemory, memory, 1);
  SX_DYNAMIC_SHARED(float, cache);
  BlockMemory& m = memory[0];
  const SampleState& a = args.state;
  const int64_t b = blockIdx.x, s = static_cast<unsigned>(a.first_stream) + blockIdx.y;
  // Once for the block: its last warps might find the request moved on by another block, after this one has arrived.
  if (thread_index() == 0) m.position = position_of(a, b);
  __syncthreads();
  const Position p = m.position;
  const StreamRow row = stream_row(a, p, b, s);
  bool may_have_content = has_content(row, s, p.finish);
  if (s > 0 && !may_have_content) {  // with stream 0's end in this row it may have
    const StreamRow first = stream_row(a, p, b, 0);
    may_have_content = has_content(first, 0, p.finish) && has_content(row, s, first.frame);
  }
  Result result{0, 0.0f, false};
  if (may_have_content) result = sample(m, args, p, row, b, s, room, cache);
  if (thread_index() == 0) {
    const int64_t at = b * a.num_streams + s;
    a.tokens[at] = result.token;
    a.logprob[at] = result.logprob;
    a.is_content[at] = result.has_failed ? kHasFailed : kHasToken;
    __threadfence();
    const Wide arrived = atomicAdd(reinterpret_cast<Wide*>(&a.progress[b].arrived), Wide{1});
    m.finished = arrived + 1 == gridDim.y ? static_cast<int>(blockIdx.x) : -1;
    __threadfence();
  }
  __syncthreads();
  if (m.finished >= 0) finish_request(m, a, m.finished);
}

}  // namespace

template <typename T>
void multistream_sample_cuda(const SampleArgs<T>& args, int device, void* stream) {
  const SampleState& a = args.state;
  if (a.num_requests == 0) return;
  int64_t widest = 0;
  for (int64_t s = a.first_stream; s < a.end_stream; ++s) {
    const int64_t width = a.bounds[s + 1] - a.bounds[s];
    widest = width > widest ? width : widest;
  }
  DynamicMemory room;
  room.cached = static_cast<int>(widest < kCachedLogits ? widest : kCachedLogits);
  room.words = a.num_history > 0 ? static_cast<int>(widest / 32 + 1) : 0;
  const size_t bytes = (static_cast<size_t>(room.cached) + static_cast<size_t>(room.words)) * 4;
  const DeviceGuard guard(device);
  const auto kernel = &sample_kernel<T>;
  if (bytes + sizeof(BlockMemory) > 48 * 1024) {
    int most = 0;
    cuda_check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "cudaDeviceGetAttribute");
    SX_CHECK(bytes + sizeof(BlockMemory) <= static_cast<size_t>(most), "multistream_sample: a stream of ", widest,
             " columns needs ", bytes + sizeof(BlockMemory), " bytes of shared memory and this GPU has ", most,
             " for a block; give the stream fewer columns, or set num_rows=0, which is without repetition penalty");
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
               "multistream_sample: shared memory");
  }
  SX_CHECK(a.num_requests < (int64_t{1} << 31), "multistream_sample: ", a.num_requests,
           " requests are more than a launch takes");
  const dim3 grid(static_cast<unsigned>(a.num_requests), static_cast<unsigned>(a.end_stream - a.first_stream));
  SX_LAUNCH(kernel, grid, kSampleThreads, bytes, static_cast<cudaStream_t>(stream), args, room);
  cuda_check(cudaGetLastError(), "multistream_sample: launch");
}

template void multistream_sample_cuda<float>(const SampleArgs<float>&, int, void*);
template void multistream_sample_cuda<BFloat16>(const SampleArgs<BFloat16>&, int, void*);
template void multistream_sample_cuda<Float16>(const SampleArgs<Float16>&, int, void*);

}  // namespace speechlm
