// The kernel table of src/kernel as structs: memory, numbers that choose a variant, numbers of the launch, in the order in
// which the host writes them. Written by the test cuda::header with GATEDELTA_WRITE=1.
#pragma once
#include <stdint.h>

namespace row::conv {
struct Memory {
    const void* x;
    const void* w;
    const void* seqs;
    void* tail;
    void* y;
};
struct Consts {
    uint32_t taps;
    uint32_t silu;
    uint32_t store_tail;
};
struct Params {
    uint32_t channels;
    uint32_t x_stride;
    uint32_t x_off;
    uint32_t y_stride;
    uint32_t y_off;
    uint32_t block;
};
struct Launch {
    Memory m;
    uint64_t bytes[5];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::conv_tail {
struct Memory {
    const void* x;
    const void* seqs;
    void* tail;
};
struct Consts {
    uint32_t taps;
};
struct Params {
    uint32_t channels;
    uint32_t x_stride;
    uint32_t x_off;
    uint32_t y_stride;
    uint32_t y_off;
    uint32_t block;
};
struct Launch {
    Memory m;
    uint64_t bytes[3];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::gate {
struct Memory {
    const void* ab;
    const void* a_log;
    const void* dt_bias;
    void* g;
    void* beta;
};
struct Consts {
    uint32_t block;
};
struct Params {
    uint32_t tokens;
    uint32_t hv;
    uint32_t stride;
    uint32_t a_off;
    uint32_t b_off;
};
struct Launch {
    Memory m;
    uint64_t bytes[5];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::gdn_prepare {
struct Memory {
    const void* q;
    const void* k;
    const void* g;
    const void* beta;
    const void* chunks;
    void* ws;
};
struct Consts {
    uint32_t chunk;
    uint32_t dk;
    uint32_t group;
    uint32_t qk_type;
    uint32_t l2norm;
    uint32_t grad;
    uint32_t lanes;
};
struct Params {
    uint32_t hk;
    uint32_t hv;
    uint32_t head_map;
    uint32_t q_stride;
    uint32_t q_off;
    uint32_t k_stride;
    uint32_t k_off;
    uint32_t g_off;
    float scale;
};
struct Launch {
    Memory m;
    uint64_t bytes[6];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::gdn_cut {
struct Memory {
    const void* ws;
    const void* segments;
    void* walks;
};
struct Consts {
    uint32_t chunk;
    uint32_t grad;
    uint32_t back;
    uint32_t exact;
};
struct Params {
    uint32_t hv;
    uint32_t segments;
    uint32_t sequences;
    uint32_t half;
    float forgotten;
};
struct Launch {
    Memory m;
    uint64_t bytes[3];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::gdn_carry {
struct Memory {
    const void* walks;
    const void* m;
    const void* sequences;
    const void* segments;
    const void* state;
    void* carried;
};
struct Consts {
    uint32_t dk;
    uint32_t dv_tile;
    uint32_t back;
    uint32_t lanes;
};
struct Params {
    uint32_t hv;
    uint32_t dv;
};
struct Launch {
    Memory m;
    uint64_t bytes[6];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::gdn_scan {
struct Memory {
    const void* q;
    const void* k;
    const void* v;
    const void* ws;
    const void* chunks;
    const void* segments;
    void* state;
    void* o;
};
struct Consts {
    uint32_t chunk;
    uint32_t dk;
    uint32_t dv_tile;
    uint32_t qk_type;
    uint32_t v_type;
    uint32_t save;
    uint32_t walk;
    uint32_t grad;
    uint32_t lanes;
};
struct Params {
    uint32_t hk;
    uint32_t hv;
    uint32_t head_map;
    uint32_t dv;
    uint32_t q_stride;
    uint32_t q_off;
    uint32_t k_stride;
    uint32_t k_off;
    uint32_t v_stride;
    uint32_t v_off;
    uint32_t o_stride;
    uint32_t o_off;
};
struct Launch {
    Memory m;
    uint64_t bytes[8];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::gdn_step {
struct Memory {
    const void* q;
    const void* k;
    const void* v;
    const void* g;
    const void* beta;
    const void* seqs;
    void* state;
    void* o;
};
struct Consts {
    uint32_t dk;
    uint32_t dv_tile;
    uint32_t qk_type;
    uint32_t v_type;
    uint32_t l2norm;
    uint32_t store;
    uint32_t lanes;
};
struct Params {
    uint32_t hk;
    uint32_t hv;
    uint32_t head_map;
    uint32_t dv;
    uint32_t q_stride;
    uint32_t q_off;
    uint32_t k_stride;
    uint32_t k_off;
    uint32_t v_stride;
    uint32_t v_off;
    uint32_t o_stride;
    uint32_t o_off;
    uint32_t g_off;
    float scale;
};
struct Launch {
    Memory m;
    uint64_t bytes[8];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::gated_norm {
struct Memory {
    const void* o;
    const void* z;
    const void* w;
    void* y;
};
struct Consts {
    uint32_t dv;
    uint32_t lanes;
};
struct Params {
    uint32_t hv;
    uint32_t tokens;
    uint32_t z_stride;
    uint32_t z_off;
    float eps;
};
struct Launch {
    Memory m;
    uint64_t bytes[4];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::gdn_mix_step {
struct Memory {
    const void* qkv;
    const void* proj;
    const void* small;
    const void* seqs;
    void* state;
    void* y;
};
struct Consts {
    uint32_t dk;
    uint32_t dv;
    uint32_t lanes;
};
struct Params {
    uint32_t hk;
    uint32_t hv;
    uint32_t head_map;
    uint32_t qkv_stride;
    uint32_t p_stride;
    uint32_t z_off;
    uint32_t a_off;
    uint32_t b_off;
    float scale;
    float eps;
};
struct Launch {
    Memory m;
    uint64_t bytes[6];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::gdn_grad_scan {
struct Memory {
    const void* q;
    const void* k;
    const void* d_o;
    const void* ws;
    const void* chunks;
    const void* segments;
    void* dstate;
    void* dsaved;
};
struct Consts {
    uint32_t chunk;
    uint32_t dk;
    uint32_t dv_tile;
    uint32_t qk_type;
    uint32_t v_type;
    uint32_t walk;
    uint32_t lanes;
};
struct Params {
    uint32_t hk;
    uint32_t hv;
    uint32_t head_map;
    uint32_t dv;
    uint32_t q_stride;
    uint32_t q_off;
    uint32_t k_stride;
    uint32_t k_off;
    uint32_t do_stride;
    uint32_t do_off;
};
struct Launch {
    Memory m;
    uint64_t bytes[8];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::gdn_grad_chunk {
struct Memory {
    const void* v;
    const void* d_o;
    void* ws;
    const void* saved;
    const void* dsaved;
    const void* chunks;
    void* dv;
};
struct Consts {
    uint32_t chunk;
    uint32_t dk;
    uint32_t dv;
    uint32_t v_type;
    uint32_t lanes;
};
struct Params {
    uint32_t hv;
    uint32_t v_stride;
    uint32_t v_off;
    uint32_t do_stride;
    uint32_t do_off;
    uint32_t dv_stride;
    uint32_t dv_off;
    float scale;
};
struct Launch {
    Memory m;
    uint64_t bytes[7];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::gdn_grad_qk {
struct Memory {
    const void* q;
    const void* k;
    void* ws;
    const void* saved;
    const void* dsaved;
    const void* chunks;
    void* dq;
    void* dk;
};
struct Consts {
    uint32_t chunk;
    uint32_t dk;
    uint32_t dv;
    uint32_t group;
    uint32_t qk_type;
    uint32_t l2norm;
    uint32_t lanes;
};
struct Params {
    uint32_t hk;
    uint32_t hv;
    uint32_t head_map;
    uint32_t q_stride;
    uint32_t q_off;
    uint32_t k_stride;
    uint32_t k_off;
    uint32_t dq_stride;
    uint32_t dq_off;
    uint32_t dk_stride;
    uint32_t dk_off;
};
struct Launch {
    Memory m;
    uint64_t bytes[8];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::gdn_grad_gates {
struct Memory {
    const void* ws;
    const void* chunks;
    void* dg;
    void* dbeta;
};
struct Consts {
    uint32_t chunk;
};
struct Params {
    uint32_t hv;
    uint32_t g_off;
};
struct Launch {
    Memory m;
    uint64_t bytes[4];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::conv_grad {
struct Memory {
    const void* x;
    const void* w;
    const void* seqs;
    const void* tail;
    const void* dy;
    void* dx;
    void* part;
};
struct Consts {
    uint32_t taps;
    uint32_t silu;
};
struct Params {
    uint32_t channels;
    uint32_t count;
    uint32_t x_stride;
    uint32_t x_off;
    uint32_t dy_stride;
    uint32_t dy_off;
    uint32_t dx_stride;
    uint32_t dx_off;
    uint32_t block;
    uint32_t cells;
};
struct Launch {
    Memory m;
    uint64_t bytes[7];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::conv_tail_grad {
struct Memory {
    const void* x;
    const void* w;
    const void* seqs;
    const void* tail;
    const void* dy;
    const void* dtail_out;
    void* dx;
    void* dtail;
};
struct Consts {
    uint32_t taps;
    uint32_t silu;
    uint32_t add;
    uint32_t store;
};
struct Params {
    uint32_t channels;
    uint32_t count;
    uint32_t x_stride;
    uint32_t x_off;
    uint32_t dy_stride;
    uint32_t dy_off;
    uint32_t dx_stride;
    uint32_t dx_off;
    uint32_t block;
    uint32_t cells;
};
struct Launch {
    Memory m;
    uint64_t bytes[8];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::gate_grad {
struct Memory {
    const void* ab;
    const void* a_log;
    const void* dt_bias;
    const void* dg;
    const void* dbeta;
    void* dab;
    void* part;
};
struct Consts {
    uint32_t lanes;
};
struct Params {
    uint32_t tokens;
    uint32_t hv;
    uint32_t stride;
    uint32_t a_off;
    uint32_t b_off;
    uint32_t d_stride;
    uint32_t da_off;
    uint32_t db_off;
    uint32_t block;
};
struct Launch {
    Memory m;
    uint64_t bytes[7];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::gated_norm_grad {
struct Memory {
    const void* o;
    const void* z;
    const void* w;
    const void* dy;
    void* d_o;
    void* dz;
    void* part;
};
struct Consts {
    uint32_t dv;
    uint32_t lanes;
};
struct Params {
    uint32_t hv;
    uint32_t tokens;
    uint32_t z_stride;
    uint32_t z_off;
    uint32_t dz_stride;
    uint32_t dz_off;
    uint32_t block;
    float eps;
};
struct Launch {
    Memory m;
    uint64_t bytes[7];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::sum_rows {
struct Memory {
    const void* x;
    void* y;
};
struct Consts {
    uint32_t columns;
    uint32_t lanes;
};
struct Params {
    uint32_t rows;
    uint32_t n;
    uint32_t x_stride;
    uint32_t x_off;
};
struct Launch {
    Memory m;
    uint64_t bytes[2];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::embed {
struct Memory {
    const void* ids;
    const void* table;
    void* x;
};
struct Consts {
    uint32_t w_type;
};
struct Params {
    uint32_t dim;
    uint32_t row0;
    uint32_t rows;
};
struct Launch {
    Memory m;
    uint64_t bytes[3];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::rms_norm {
struct Memory {
    const void* x;
    const void* w;
    void* y;
};
struct Consts {
    uint32_t lanes;
};
struct Params {
    uint32_t dim;
    uint32_t row0;
    float eps;
};
struct Launch {
    Memory m;
    uint64_t bytes[3];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::matmul {
struct Memory {
    const void* x;
    const void* w;
    void* y;
};
struct Consts {
    uint32_t w_type;
    uint32_t add;
    uint32_t tile_m;
    uint32_t tile_n;
    uint32_t tile_k;
    uint32_t reg_m;
    uint32_t reg_n;
    uint32_t lanes;
    uint32_t wide;
};
struct Params {
    uint32_t m;
    uint32_t n;
    uint32_t k;
    uint32_t x_stride;
    uint32_t x_off;
    uint32_t y_stride;
    uint32_t y_off;
};
struct Launch {
    Memory m;
    uint64_t bytes[3];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::matvec {
struct Memory {
    const void* x;
    const void* norm;
    const void* w;
    const void* up;
    void* y;
};
struct Consts {
    uint32_t w_type;
    uint32_t add;
    uint32_t norm;
    uint32_t glu;
    uint32_t rows;
    uint32_t batch;
    uint32_t lanes;
    uint32_t wide;
};
struct Params {
    uint32_t m;
    uint32_t n;
    uint32_t k;
    uint32_t x_stride;
    uint32_t x_off;
    uint32_t y_stride;
    uint32_t y_off;
    float eps;
};
struct Launch {
    Memory m;
    uint64_t bytes[5];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::attn_prepare {
struct Memory {
    const void* qkv;
    const void* q_norm;
    const void* k_norm;
    const void* rope;
    const void* pos;
    void* q;
    void* k_cache;
    void* v_cache;
};
struct Consts {
    uint32_t dim;
    uint32_t rot;
    uint32_t kv_type;
    uint32_t lanes;
};
struct Params {
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t page_start;
    uint32_t page_len;
    float eps;
};
struct Launch {
    Memory m;
    uint64_t bytes[8];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::attend {
struct Memory {
    const void* q;
    const void* k_cache;
    const void* v_cache;
    const void* pos;
    void* part;
};
struct Consts {
    uint32_t dim;
    uint32_t kv_type;
    uint32_t tile_q;
    uint32_t tile_k;
    uint32_t lanes;
};
struct Params {
    uint32_t tokens;
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t page_start;
    uint32_t page_len;
    uint32_t span;
    uint32_t slot0;
    uint32_t slots;
    float scale;
};
struct Launch {
    Memory m;
    uint64_t bytes[5];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::attend_merge {
struct Memory {
    const void* part;
    const void* qkv;
    void* y;
};
struct Consts {
    uint32_t dim;
    uint32_t lanes;
};
struct Params {
    uint32_t heads;
    uint32_t slots;
    uint32_t qkv_stride;
};
struct Launch {
    Memory m;
    uint64_t bytes[3];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::swiglu {
struct Memory {
    const void* gate_up;
    void* y;
};
struct Consts {
    uint32_t block;
};
struct Params {
    uint32_t rows;
    uint32_t dim;
};
struct Launch {
    Memory m;
    uint64_t bytes[2];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::argmax {
struct Memory {
    const void* x;
    void* ids;
};
struct Consts {
    uint32_t lanes;
};
struct Params {
    uint32_t n;
};
struct Launch {
    Memory m;
    uint64_t bytes[2];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::copy {
struct Memory {
    const void* src;
    void* dst;
};
struct Consts {
    uint32_t block;
};
struct Params {
    uint32_t n;
    uint32_t src_off;
    uint32_t dst_off;
    uint32_t word;
};
struct Launch {
    Memory m;
    uint64_t bytes[2];
    uint32_t base[3];
    Consts c;
    Params p;
};
}

namespace row::fill {
struct Memory {
    void* dst;
};
struct Consts {
    uint32_t block;
};
struct Params {
    uint32_t n;
    uint32_t src_off;
    uint32_t dst_off;
    uint32_t word;
};
struct Launch {
    Memory m;
    uint64_t bytes[1];
    uint32_t base[3];
    Consts c;
    Params p;
};
}
